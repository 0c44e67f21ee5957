"""The launcher: ranks start together, end together, and the one that failed first is the one that is named."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch import job
from weft.launch.signals import stop_request

ROOT = Path(__file__).parents[2]
RANKS = 2

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a job of `RANKS` ranks that call a function of `tests.launch.job`; leaves none of it behind."""
    started: list[subprocess.Popen[str]] = []

    def start(function: Callable[..., None], *overrides: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.launch.job", function.__name__, str(RANKS), str(tmp_path), *overrides]
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MASTER_PORT")
        }
        process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pid in rank_pids(tmp_path):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def rank_pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("started-*")]


def wait_for_ranks(folder: Path) -> list[int]:
    wait_until(lambda: len(rank_pids(folder)) == RANKS, seconds=60)
    return rank_pids(folder)


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    running = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process.pid for process in running if process.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def log(folder: Path, name: str) -> str:
    (path,) = folder.glob(f"logs/*/{name}")
    return path.read_text()


@pytest.mark.parametrize("user_chooses", [False, True])
def test_ranks_meet_and_only_rank_0_writes_to_the_terminal(start: Start, tmp_path: Path, user_chooses: bool) -> None:
    chosen = {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "2"} if user_chooses else {}
    process = start(job.succeed, "train.steps=2", **chosen)
    output, errors = process.communicate(timeout=120)
    threads = chosen.get("OMP_NUM_THREADS", "1")
    assert (process.returncode, errors) == (0, "")
    assert output == f"rank 0 of 2 has {threads} thread: ['train.steps=2']\n"
    assert log(tmp_path, "rank-1-stdout.log").startswith("rank 1 of 2")


def test_failing_rank_is_named_once_and_first(start: Start, tmp_path: Path) -> None:
    process = start(job.fail_in_collective)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("Rank 1 failed: ValueError: the layer has a hole (traceback in ")
    assert (output, errors.count("\n")) == ("", 1)
    assert "in the middle" in log(tmp_path, "rank-1-stderr.log")


def test_failing_rank_ends_deaf_peers_within_10_seconds(start: Start, tmp_path: Path) -> None:
    process = start(job.fail_beside_deaf)
    pids = wait_for_ranks(tmp_path)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert errors.startswith("Rank 1 failed: ValueError: the layer has a hole (")
    assert not alive(pids)


def test_killed_rank_is_named(start: Start, tmp_path: Path) -> None:
    process = start(job.be_killed)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("Rank 1 was killed by SIGKILL")
    assert errors.count("\n") == 1


def test_user_mistake_found_by_the_ranks_has_status_2(start: Start) -> None:
    process = start(job.ask_wrongly)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (2, "corpus.path is mist; choose another.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_job_saves_within_5_seconds(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start(job.work_until_stopped)
    pids = wait_for_ranks(tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number
    assert errors.splitlines() == [
        "Stopping after this step; the same signal again stops at once.",
        f"Stopped by {number.name}.",
    ]
    assert [path.read_text() for path in tmp_path.glob("saved-*")] == [number.name] * RANKS
    assert not alive(pids)
    assert output == ""


def test_ranks_that_do_not_heed_a_stop_are_ended_when_their_time_is_over(start: Start, tmp_path: Path) -> None:
    process = start(job.hang, STOP_TIMEOUT="1")
    pids = wait_for_ranks(tmp_path)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert 1 < time.monotonic() - began < 20  # the default is 30
    assert process.returncode == 128 + signal.SIGTERM
    assert not alive(pids)


def test_second_signal_ends_hanging_ranks_at_once(start: Start, tmp_path: Path) -> None:
    process = start(job.hang)
    pids = wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stderr
    assert process.stderr.readline().startswith("Stopping after this step")
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - began < 3
    assert process.returncode == 128 + signal.SIGINT
    assert not alive(pids)


def test_ranks_do_not_outlive_a_killed_launcher(start: Start, tmp_path: Path) -> None:
    process = start(job.hang)
    pids = wait_for_ranks(tmp_path)
    assert len(alive(pids)) == RANKS
    process.kill()
    wait_until(lambda: not alive(pids), seconds=5)


def test_stop_request_notes_the_first_signal_and_puts_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_request() as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
