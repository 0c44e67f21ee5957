"""Which checkpoints stay, which one a run goes on from, and what asks a run to save and end."""

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.parallel.checkpoint.small import SHARD, alone
from weft.launch.checkpoints import Checkpoints
from weft.launch.errors import RunError
from weft.launch.saved_run import find_checkpoints, step_of
from weft.launch.sections import CheckpointSettings
from weft.launch.signals import STARTED, StopRequest, stop_request
from weft.launch.units import seconds_of
from weft.parallel.checkpoint import Entry


class Weight:
    """One tensor that a run would train."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.value = mesh, torch.zeros(10)

    def entries(self) -> Iterator[Entry]:
        yield Entry("model/weight", self.value)

    def counters(self) -> dict[str, Any]:
        return {}

    def prepare(self, counters: Mapping[str, Any]) -> None:
        pass

    def loaded(self) -> None:
        pass


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with alone() as mesh:
        yield mesh


def run_of(mesh: DeviceMesh, directory: Path, **settings: Any) -> tuple[Checkpoints, Weight, list[str]]:
    said: list[str] = []
    weight = Weight(mesh)
    return Checkpoints(CheckpointSettings(directory=str(directory), **settings), weight, said.append), weight, said


def save_steps(checkpoints: Checkpoints, weight: Weight, *steps: int) -> None:
    for step in steps:
        weight.value.fill_(step)
        checkpoints.save(step, {})
    checkpoints.finish()


def steps_in(directory: Path) -> list[int]:
    return [step_of(path) for path in find_checkpoints(directory)]


def test_the_newest_and_every_so_many_steps_are_kept(mesh: DeviceMesh, tmp_path: Path) -> None:
    checkpoints, weight, _ = run_of(mesh, tmp_path, keep=2, keep_every=40)
    save_steps(checkpoints, weight, *range(10, 120, 10))
    assert steps_in(tmp_path) == [40, 80, 100, 110]
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["step-"] * 4


def test_damaged_checkpoints_are_named_passed_over_and_not_counted_among_those_kept(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    checkpoints, weight, said = run_of(mesh, tmp_path, keep=2)
    save_steps(checkpoints, weight, 1, 2)
    damaged = tmp_path / "step-00000002" / SHARD
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")

    again, weight, said = run_of(mesh, tmp_path, keep=2)
    resumed = again.resume()
    assert resumed is not None
    assert resumed[1].step == 1
    assert weight.value.tolist() == [1.0] * 10
    assert len(said) == 1
    assert str(damaged) in said[0]
    save_steps(again, weight, 3)
    assert steps_in(tmp_path) == [1, 2, 3]  # two that are whole, and the damaged one for whoever looks after it


def test_a_full_disk_stops_neither_training_nor_the_next_save(
    mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints, weight, said = run_of(mesh, tmp_path, keep=1)
    save_steps(checkpoints, weight, 1)
    with monkeypatch.context() as full:
        full.setattr(os, "write", refuse)
        save_steps(checkpoints, weight, 2)
        assert "No space left on device; training goes on without it" in said[0]
        assert steps_in(tmp_path) == [1]
        with pytest.raises(RunError, match=r"free space or set checkpoint\.directory; the newest is .*step-00000001"):
            checkpoints.save(3, {}, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save_steps(checkpoints, weight, 4)
    assert steps_in(tmp_path) == [4]


def test_a_save_that_is_due_waits_for_the_one_before_and_says_so(
    mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.1), fsync(descriptor))[1])
    checkpoints, weight, said = run_of(mesh, tmp_path)
    save_steps(checkpoints, weight, 1, 2)
    assert said == [f"checkpoint {tmp_path / 'step-00000001'} is still being written; waiting for it"]
    for step in (1, 2):
        one, weight, _ = run_of(mesh, tmp_path, resume=str(tmp_path / f"step-0000000{step}"))
        one.resume()
        assert weight.value.tolist() == [float(step)] * 10  # what it was when the save began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_signal_asks_for_a_stop_after_the_step(number: signal.Signals) -> None:
    with stop_request() as stop:
        assert not stop.due
        os.kill(os.getpid(), number)
        assert stop.due
        assert stop.requested == number.name


def test_the_time_budget_counts_from_the_start_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED, str(time.monotonic() - 100))
    stop = StopRequest()
    stop.set_budget(seconds_of("1m41s"))
    assert not stop.due
    stop.set_budget(seconds_of("1m39s"))
    assert stop.due
    assert (seconds_of("3h50m"), seconds_of("1d"), seconds_of("90s")) == (13800, 86400, 90)
