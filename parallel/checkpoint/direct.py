"""Reading and writing past the page cache, straight between the disk and this process's memory.

The cache would take a copy of every byte, and push out what somebody needs for what nobody reads again. And what is
read back through it need not have reached the disk. Linux does so with O_DIRECT, for whole pages of memory that begin
at a page; what a file system refuses, and all on systems that have nothing of the kind, goes through the cache.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

CHUNK = 4 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)
Data = TypeVar("Data")


class KeptMemory:
    """Memory into which one save after the other copies, and which is held between them.

    To touch fresh pages takes several times as long as to copy what goes there.
    """

    def __init__(self) -> None:
        self._spare: memoryview | None = None

    def take(self, size: int) -> memoryview:
        """So many bytes from the beginning of a page on, which nobody else has until they are given back."""
        spare, self._spare = self._spare, None
        whole = spare if spare is not None and len(spare) >= size else _new_pages(size)
        return whole[:size]

    def give_back(self, memory: memoryview) -> None:
        """Keep what was taken for the next who takes."""
        self._spare = memoryview(memory.obj)


def leave_cache(descriptor: int) -> None:
    """Read and write a file past the cache from now on, where that can be; forget what the cache holds of it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)


def past_cache(operation: Callable[[int, Data], int], descriptor: int, data: Data) -> int:
    """Do `os.write` or `os.readv`; what is refused past the cache, as a file's last bytes are, goes through it.

    So does whatever follows. Returns the number of bytes.
    """
    try:
        return operation(descriptor, data)
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return operation(descriptor, data)


def gathered(parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """The parts, one after the other, in chunks of whole pages; each is good until the next is asked for."""
    memory, filled = _new_pages(CHUNK), 0
    for part in parts:
        left = part
        while left:
            count = min(CHUNK - filled, len(left))
            memory[filled : filled + count] = left[:count]
            left, filled = left[count:], filled + count
            if filled == CHUNK:
                yield memory
                filled = 0
    yield memory[:filled]


def chunks_of(image: memoryview) -> Iterator[memoryview]:
    """What stands in pages already, in chunks."""
    for begin in range(0, len(image), CHUNK):
        yield image[begin : begin + CHUNK]


def read_chunks(descriptor: int) -> Iterator[memoryview]:
    """A file from where it stands to its end; each chunk is good until the next is asked for."""
    memory = _new_pages(CHUNK)
    while count := past_cache(os.readv, descriptor, [memory]):
        yield memory[:count]


def _new_pages(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
