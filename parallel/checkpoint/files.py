"""The file operations of a checkpoint, each of which may fail or be the last: what they leave is always whole.

A checkpoint is written into a hidden directory beside its place, synced, and renamed last.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from weft.parallel.checkpoint.direct import leave_cache, past_cache, read_chunks

WORK_SUFFIX = ".part"
OLD_SUFFIX = ".old"
TRASH_SUFFIX = ".trash"


def work_directory(directory: Path) -> Path:
    """Where the checkpoint `directory` is written until it is whole."""
    return directory.with_name(f".{directory.name}{WORK_SUFFIX}")


def publish(directory: Path) -> None:
    """Put the finished work directory in its place.

    One of that name is moved to `NAME.old` first, and removed when the new one stands: at every moment one is whole.
    """
    old = directory.with_name(f"{directory.name}{OLD_SUFFIX}")
    sync_directory(work_directory(directory))
    if directory.exists():
        remove(old)
        directory.rename(old)
    work_directory(directory).rename(directory)
    sync_directory(directory.parent)
    remove(old)


def remove(directory: Path) -> None:
    """Remove a checkpoint: renamed first, so that no half of it is ever taken for one. A missing one is fine.

    Raises:
        OSError: it could not be removed.
    """
    trash = directory.with_name(f".{directory.name.lstrip('.')}{TRASH_SUFFIX}")
    if trash.exists():
        shutil.rmtree(trash)
    if directory.exists():
        directory.rename(trash)
        shutil.rmtree(trash)


def remove_strangers(directory: Path, listed: set[str]) -> None:
    """Remove what an interrupted save of more ranks has left in the work directory."""
    for path in directory.iterdir():
        if path.name not in listed:
            path.unlink()


def create(path: Path) -> int:
    """A descriptor to write a new file by; what stood there before is gone."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it; one `os.write` may write less, 2 GiB at most on Linux."""
    left = memoryview(data)
    while left:
        left = left[past_cache(os.write, descriptor, left) :]


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on disk when this returns."""
    descriptor = create(path)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Bring renames and new names in the directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file by; links, pipes and devices, which may lead anywhere or block, are refused.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """A regular file's content.

    Raises:
        OSError: it cannot be read, or has more than `limit` bytes.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes")
        data = bytearray(size)
        read_into(descriptor, data, 0)
        return bytes(data)
    finally:
        os.close(descriptor)


def read_into(descriptor: int, target: bytearray | memoryview, begin: int) -> None:
    """Fill `target` from the file's byte `begin` on.

    Raises:
        OSError: the file ends before.
    """
    left = memoryview(target)
    while left:
        count = os.preadv(descriptor, [left], begin)
        if not count:
            raise OSError(errno.EIO, "it ends too early")
        left, begin = left[count:], begin + count


def checksum_of(path: Path, *, from_disk: bool = False) -> int:
    """The CRC-32 of a file; `from_disk` leaves out what the system still holds of it in memory.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = open_regular(path)
    try:
        if from_disk:
            leave_cache(descriptor)
        checksum = 0
        for chunk in read_chunks(descriptor):
            checksum = crc32(chunk, checksum)
        return checksum
    finally:
        os.close(descriptor)


def check_safetensors(descriptor: int) -> None:
    """Check that a file begins as safetensors files do: the length of a JSON header, and the header.

    Raises:
        OSError: it does not.
    """
    start = os.pread(descriptor, 9, 0)
    if start[8:] != b"{" or int.from_bytes(start[:8], "little") > os.fstat(descriptor).st_size - 8:
        raise OSError("it is not a safetensors file")


def looks_pickled(path: Path) -> bool:
    """Whether a file has the name or the first bytes of a pickle, which can run code when it is loaded."""
    if path.name.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp", ".metadata")):
        return True
    try:
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        start = os.pread(descriptor, 4, 0)
    finally:
        os.close(descriptor)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))
