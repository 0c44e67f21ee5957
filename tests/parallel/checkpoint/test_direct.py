"""Past the page cache, and where a file system refuses that: the same bytes on disk."""

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.parallel.checkpoint.small import SHARD, alone
from weft.parallel.checkpoint import MANIFEST, Entry, KeptMemory, Save, load_checkpoint
from weft.parallel.checkpoint.direct import CHUNK
from weft.parallel.checkpoint.files import checksum_of
from weft.parallel.checkpoint.verify import problems_of

DIRECT = getattr(os, "O_DIRECT", 0)


def entries() -> list[Entry]:
    """A few chunks and a few bytes; entries of 1, 2, 4 and 8 bytes, of odd numbers, in an order that aligns none."""
    generator = torch.Generator().manual_seed(3)
    large = torch.randn(2 * CHUNK // 4 + 5, generator=generator)
    return [
        Entry("model/flags", torch.rand(13, generator=generator) < 0.5),
        Entry("model/half", torch.randn(3, 7, generator=generator).to(torch.bfloat16).t()),
        Entry("model/none", torch.empty(0, 4)),
        Entry("model/large", large),
        Entry("model/count", torch.tensor(7)),
    ]


def save(directory: Path, memory: KeptMemory | None) -> None:
    with alone() as mesh:
        Save(directory, entries(), {}, mesh, memory=memory).finish()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("saved") / "saved"
    save(directory, None)
    return content(directory)


def test_the_checksums_are_those_of_zlib_and_the_tensors_are_those_saved(tmp_path: Path) -> None:
    save(tmp_path / "saved", KeptMemory())
    data, manifest = (tmp_path / "saved" / SHARD).read_bytes(), json.loads((tmp_path / "saved" / MANIFEST).read_text())
    assert manifest["files"] == {SHARD: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}}
    for piece in (piece for tensor in manifest["tensors"].values() for piece in tensor["pieces"]):
        part = data[piece["begin"] : piece["begin"] + piece["bytes"]]
        assert piece["crc32"] == f"{zlib.crc32(part):08x}"
    held = [Entry(entry.name, torch.zeros_like(entry.tensor)) for entry in entries()]
    load_checkpoint(tmp_path / "saved", held)
    for loaded, saved in zip(held, entries(), strict=True):
        torch.testing.assert_close(loaded.tensor, saved.tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "saved" / SHARD, "pt") as file:
        assert torch.equal(file.get_tensor("model/half"), entries()[1].tensor)


def test_a_save_from_memory_used_before_writes_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
    memory = KeptMemory()
    filled = memory.take(10 * CHUNK)
    filled[:] = b"\xff" * len(filled)
    memory.give_back(filled)
    for name in ("first", "second"):
        save(tmp_path / name, memory)
        assert content(tmp_path / name) == expected


def test_memory_in_use_is_given_to_nobody_else() -> None:
    memory = KeptMemory()
    first, second = memory.take(100), memory.take(100)
    first[:], second[:] = b"a" * 100, b"b" * 100
    assert bytes(first) == b"a" * 100
    memory.give_back(first)
    assert bytes(memory.take(50)) == b"a" * 50
    assert len(memory.take(10_000)) == 10_000


def read_from_disks() -> int:
    """What this process has had read from disks so far, by the system's own count."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts what is read on Linux alone")
def test_a_save_is_read_back_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(bytes(2 * CHUNK))
    before = read_from_disks()
    checksum_of(tmp_path / "probe", from_disk=True)
    if read_from_disks() == before:
        pytest.skip("this folder is on no disk")
    before = read_from_disks()
    save(tmp_path / "saved", KeptMemory())
    assert read_from_disks() - before >= (tmp_path / "saved" / SHARD).stat().st_size


@pytest.mark.skipif(not DIRECT, reason="only Linux has O_DIRECT")
@pytest.mark.parametrize("refused", ["from the start", "the second chunk written", "the second chunk read"])
@pytest.mark.parametrize("memory", [None, KeptMemory()], ids=["at once", "from memory"])
def test_a_file_system_that_refuses_gets_the_same_bytes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], refused: str, memory: KeptMemory | None
) -> None:
    control, count = fcntl.fcntl, 0

    def refuse_direct(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(descriptor, command, argument)

    def refuse_second(operation: Callable[..., int]) -> Callable[..., int]:
        def refusing(descriptor: int, data: Sequence[Any]) -> int:
            nonlocal count
            if control(descriptor, fcntl.F_GETFL) & DIRECT:
                count += 1
                if count > 1:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return operation(descriptor, data)

        return refusing

    if refused == "from the start":
        monkeypatch.setattr(fcntl, "fcntl", refuse_direct)
    else:
        name = "write" if "written" in refused else "readv"
        monkeypatch.setattr(os, name, refuse_second(getattr(os, name)))
    save(tmp_path / "saved", memory)
    assert content(tmp_path / "saved") == expected
    assert not list(problems_of(tmp_path / "saved"))


@pytest.mark.skipif(not DIRECT, reason="only Linux has O_DIRECT")
def test_another_refusal_is_not_taken_for_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(Exception, match="Input/output error"):
        save(tmp_path / "saved", KeptMemory())
