"""Every message in the table of docs/reliability.md is said by weft, and every message said here is in the table."""

import errno
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.launch.message_tables import matches, rows
from tests.launch.test_checkpoints import ONE, build, train
from tests.parallel.checkpoint.small import SHARD, alone
from tests.parallel.checkpoint.test_hostile import change
from weft.launch.checkpoints import Checkpoints
from weft.launch.errors import RunError, UserError
from weft.launch.metrics import MetricsWriter, StepMetrics
from weft.launch.preflight import check_directory, check_run
from weft.launch.reshard import reshard
from weft.launch.saved_run import read_run
from weft.launch.settings import build_settings, load_settings
from weft.parallel import build_mesh
from weft.parallel.checkpoint import MANIFEST, CheckpointError
from weft.parallel.checkpoint.verify import problems_of

PAGE = "reliability.md"
STEP = "step-00000002"
Saved = tuple[Checkpoints, Path]
Scenario = Callable[[Checkpoints, Path, pytest.MonkeyPatch], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoints, Path]]:
    """The checkpoints of a small run, with one saved."""
    directory = tmp_path_factory.mktemp("saved")
    with alone():
        engine, checkpoints = build(ONE, directory)
        train(engine, range(2))
        checkpoints.save(2, {"settings": engine.settings.model_dump(mode="json")}, last=True)
        yield checkpoints, directory


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_tensor(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    flip(path / SHARD, -1)
    checkpoints.resume()


def flip_tensor_of_named(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    flip(path / SHARD, -1)
    by_name(checkpoints, path, patch)


def flip_manifest(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    flip(path / MANIFEST, 40)
    by_name(checkpoints, path, patch)


def by_name(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Resume from the checkpoint by its path."""
    named = checkpoints.settings.model_copy(update={"resume": str(path)})
    Checkpoints(named, checkpoints.state, checkpoints.say).resume()


def changed(edit: Callable[[dict[str, Any]], Any]) -> Scenario:
    def scenario(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
        change(path, edit)
        by_name(checkpoints, path, patch)

    return scenario


def missing_shard(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / SHARD).unlink()
    by_name(checkpoints, path, patch)


def other_format(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / MANIFEST).write_text('{"format": 1}')
    by_name(checkpoints, path, patch)


def with_pickle(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / "notes").write_bytes(pickle.dumps({}))
    by_name(checkpoints, path, patch)


def no_run(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    change(path, lambda manifest: manifest["metadata"].pop("step"))
    read_run(path)


def overlapping(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Two pieces of half a tensor's size, the second said to begin in the first."""

    def edit(manifest: dict[str, Any]) -> None:
        tensor = manifest["tensors"]["model/norm.weight"]
        (piece,) = tensor["pieces"]
        half = piece | {"bytes": 64, "shape": [16]}
        tensor["pieces"] = [half, half | {"begin": piece["begin"] + 64, "offset": [8]}]

    change(path, edit)
    by_name(checkpoints, path, patch)


def no_manifest(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / MANIFEST).unlink()
    by_name(checkpoints, path, patch)


def no_such(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    settings = build_settings(read_run(path).settings)
    named = settings.checkpoint.model_copy(update={"resume": str(path / "nowhere"), "directory": str(path)})
    report = settings.report.model_copy(update={"directory": str(path / "run")})
    cluster = settings.cluster.model_copy(update={"device": "cpu"})
    check_run(settings.model_copy(update={"checkpoint": named, "report": report, "cluster": cluster}), 1)


def in_file(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    check_directory("checkpoint.directory", str(path / MANIFEST / "x"))


def may_not_write(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda *_: False)
    check_directory("checkpoint.directory", str(path / "x"))


def full_disk(last: bool) -> Scenario:
    def scenario(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", refuse)
        checkpoints.save(4, {}, last=last)
        checkpoints.finish()

    return scenario


def full_disk_of_metrics(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    if not Path("/dev/full").exists():
        pytest.skip("the file that is a full disk is Linux's")
    (path / "run").mkdir()
    (path / "run/metrics.jsonl").symlink_to("/dev/full")
    with redirect_stderr(StringIO()) as screen, pytest.MonkeyPatch.context() as broken:
        broken.setattr("weft.launch.metrics._keep_steps_before", lambda *_: None)
        broken.setitem(sys.modules, "torch.utils.tensorboard", None)
        writer = MetricsWriter(path / "run")
        writer.write(StepMetrics(step=1))
    return screen.getvalue().splitlines()


def slow_disk(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    patch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.2), fsync(descriptor))[1])
    checkpoints.save(4, {})
    checkpoints.save(6, {}, last=True)


def cannot_remove(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    for step in (4, 6):
        checkpoints.save(step, {}, last=True)
    patch.setattr(shutil, "rmtree", refuse)
    checkpoints.save(8, {}, last=True)


def bad_duration(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    build_settings({"name": "x", "model": {"a": 1}, "train": {"stop_after": "4 hours"}})


def no_checkpoint(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    from weft.launch.checkpoint_command import list_command

    (path / MANIFEST).unlink()
    list_command.callback(path)  # type: ignore[misc]


def shorter(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])
    return list(problems_of(path))


def flipped(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    flip(path / SHARD, -1)
    (path / "notes").write_text("mine")
    return list(problems_of(path))


def verify_without_shard(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    from weft.launch.checkpoint_command import verify_command

    (path / SHARD).unlink()
    with pytest.raises(RunError) as caught:
        verify_command.callback((path,))  # type: ignore[misc]
    return [str(caught.value), *problems_of(path)]


def reshard_onto(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    reshard(path, path, [])


def reshard_stranger(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    change(path, lambda manifest: manifest["metadata"].pop("settings"))
    reshard(path, path / "new", [])


def reshard_nowhere(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    reshard(path, Path("/proc/nowhere/new"), [])


def reshard_renamed(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
    change(path, lambda manifest: manifest["tensors"].update(other=manifest["tensors"].pop("model/norm.weight")))
    dist.destroy_process_group()  # a process that reshards is alone
    try:
        reshard(path, path / "new", [])
    finally:
        build_mesh()


def settings_file(text: str) -> Scenario:
    def scenario(checkpoints: Checkpoints, path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "settings.yaml").write_text(text)
        load_settings(path / "settings.yaml")

    return scenario


SCENARIOS: list[Scenario] = [
    flip_tensor,
    flip_tensor_of_named,
    flip_manifest,
    missing_shard,
    other_format,
    changed(lambda manifest: manifest["files"].update({"../x": {"bytes": 0, "crc32": "00000000"}})),
    with_pickle,
    changed(lambda manifest: manifest["tensors"].pop("model/norm.weight")),
    no_run,
    changed(lambda manifest: manifest["metadata"].update(counters={})),
    overlapping,
    no_manifest,
    no_such,
    in_file,
    may_not_write,
    full_disk(last=False),
    full_disk(last=True),
    full_disk_of_metrics,
    slow_disk,
    cannot_remove,
    bad_duration,
    no_checkpoint,
    shorter,
    flipped,
    verify_without_shard,
    reshard_onto,
    reshard_stranger,
    reshard_nowhere,
    reshard_renamed,
    settings_file("[" * 5000),
    settings_file("a: &a [1, *a]"),
    settings_file("a: " + "9" * 101),
]


@pytest.fixture(scope="module")
def messages(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each scenario says, each with a copy of the checkpoint of its own."""
    checkpoints, directory = saved
    said: list[str] = []
    for scenario in SCENARIOS:
        folder = tmp_path_factory.mktemp("scenario")
        path = Path(shutil.copytree(directory / STEP, folder / STEP))
        own = checkpoints.settings.model_copy(update={"directory": str(folder), "keep": 2})
        with pytest.MonkeyPatch.context() as patch:
            try:
                said += scenario(Checkpoints(own, checkpoints.state, said.append), path, patch) or []
            except (UserError, RunError) as error:
                said.append(str(error))
            except CheckpointError as error:
                said.append(f"{error}.")
    return said


@pytest.mark.parametrize("row", rows(PAGE))
def test_each_message_of_the_page_is_said(messages: list[str], row: str) -> None:
    assert any(matches(row, message) for message in messages), "\n".join(messages)


def test_each_message_said_is_on_the_page(messages: list[str]) -> None:
    assert [message for message in messages if not any(matches(row, message) for row in rows(PAGE))] == []
