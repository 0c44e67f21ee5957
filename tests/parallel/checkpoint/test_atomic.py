"""A save that ends at any moment leaves whole what was whole."""

import errno
import itertools
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.parallel.checkpoint.faults import Died, die, failing, fill_disk
from tests.parallel.checkpoint.small import SHARD, alone, entries, loaded_seed, save
from weft.launch.saved_run import find_checkpoints
from weft.parallel.checkpoint import CheckpointError, Entry, KeptMemory, Save, SaveError, load_checkpoint
from weft.parallel.checkpoint.verify import problems_of


def newest_whole(directory: Path) -> Path:
    return next(path for path in reversed(find_checkpoints(directory)) if not list(problems_of(path)))


@pytest.fixture(autouse=True)
def _without_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies loses nothing of what it wrote, so there is no need to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are in /proc, on Linux")
def test_everything_is_on_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.rename

    def note_sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def note_rename(source: Path, target: Path) -> None:
        done.append(f"{Path(source).name} > {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    with alone() as mesh:
        save(tmp_path / "saved", 1, mesh)
    assert done == [SHARD, "manifest.json", ".saved.part", ".saved.part > saved", tmp_path.name]


@pytest.mark.parametrize("target", ["step-00000002", "step-00000001"], ids=["new", "replaced"])
def test_a_process_that_dies_at_any_file_operation_of_a_save_loses_nothing(tmp_path: Path, target: str) -> None:
    with alone() as mesh:
        for at in itertools.count(1):
            directory = tmp_path / str(at)
            save(directory / "step-00000001", 1, mesh)
            with failing(at, die) as count, suppress(Died, SaveError):
                save(directory / target, 2, mesh)
            if count.operations < at:
                break
            whole = newest_whole(directory)
            seed = loaded_seed(whole, range(1, 3))
            assert seed == 2 or whole.name.removesuffix(".old") == "step-00000001", f"operation {at}"
            save(directory / target, 3, mesh)  # and the next save is not held up by what is left
            assert loaded_seed(newest_whole(directory), range(3, 4)) == 3
    assert at > 20


def test_a_full_disk_at_any_file_operation_of_a_save_is_told_and_loses_nothing(tmp_path: Path) -> None:
    with alone() as mesh:
        save(tmp_path / "step-00000001", 1, mesh)
        told: list[str] = []
        for at in itertools.count(1):
            with failing(at, fill_disk) as count:
                try:
                    save(tmp_path / "step-00000002", 2, mesh)
                except SaveError as error:
                    told.append(str(error))
            if count.operations < at:
                break
            assert loaded_seed(tmp_path / "step-00000001", range(1, 2)) == 1
            for path in find_checkpoints(tmp_path):
                assert not list(problems_of(path)), f"operation {at}"
    assert len(told) > 10
    assert all("No space left on device" in sentence for sentence in told)


def test_a_directory_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, mode: int = 0) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with alone() as mesh, pytest.raises(SaveError, match="Read-only file system"):
        save(tmp_path / "deep" / "step-00000001", 1, mesh)


def test_what_reads_back_otherwise_than_it_was_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readv = os.readv

    def flip(descriptor: int, buffers: list[bytearray]) -> int:
        count = readv(descriptor, buffers)
        buffers[0][min(count, 700)] ^= 4
        return count

    monkeypatch.setattr(os, "readv", flip)
    with alone() as mesh, pytest.raises(SaveError, match="is not on disk what was written"):
        save(tmp_path / "step-00000001", 1, mesh)
    assert find_checkpoints(tmp_path) == []


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    gate, write = threading.Event(), os.write
    held = entries(1)
    with alone() as mesh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda *args: (gate.wait(10), write(*args))[1])
        started = Save(tmp_path / "step-00000001", held, {}, mesh, memory=KeptMemory())
        for entry in held:
            entry.tensor.add_(1)
        assert not started.written()
        gate.set()
        started.finish()
    assert loaded_seed(tmp_path / "step-00000001", range(1, 2)) == 1


def test_a_flipped_bit_anywhere_and_a_missing_byte_are_found(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    with alone() as mesh:
        save(path, 1, mesh)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for bit in range(0, 8 * len(data), max(1, len(data) // 16)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert list(problems_of(path)), f"bit {bit} of {file.name}"
        file.write_bytes(data[:-1])
        assert list(problems_of(path))
        file.write_bytes(data)
    assert not list(problems_of(path))


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    with alone() as mesh:
        save(tmp_path / "saved", 1, mesh)
    with safe_open(tmp_path / "saved" / SHARD, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        entry.name: entry.tensor.tolist() for entry in entries(1)
    }


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with alone() as mesh:
        save(tmp_path / "saved", 1, mesh)
    first, second, _, _ = entries(0)
    asked = [first, Entry(second.name, second.tensor[:2]), Entry("model/new", first.tensor)]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "saved", asked)
    assert str(caught.value) == (
        f"{tmp_path / 'saved'} is of another model: it lacks model/new; it has exp_avg/layers.0.weight, model/scale, "
        "which this model has not; model/layers.1.weight is [6, 40] there and [2, 40] here"
    )
    load_checkpoint(tmp_path / "saved", entries(0)[:1], only="model/layers.0")
