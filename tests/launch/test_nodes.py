"""Two nodes, each in a network namespace of its own: one is cut off in the middle of a step, and comes back."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.nodes import Network, NotPermittedError, network
from tests.launch.test_train import SETTINGS

PATIENCE = 120.0


@pytest.fixture
def nodes() -> Iterator[Network]:
    try:
        with network(2) as made:
            yield made
    except NotPermittedError as error:
        pytest.skip(str(error))


class Job:
    """`weft train --nnodes 1:2` on both nodes of a network, with a folder that they share."""

    def __init__(self, nodes: Network, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        settings = SETTINGS | {
            "parallel": {"data": 2},
            "train": SETTINGS["train"] | {"steps": 100000, "timeout": 10, "evaluate_every": 0},
            "checkpoint": {"every": 5},
        }
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
        (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))

    def start(self, node: int) -> subprocess.Popen[bytes]:
        return self.nodes.popen(
            node,
            [sys.executable, "-m", "weft", "train", "--nnodes", "1:2", "tiny.yaml"],
            folder=self.folder,
            output=self.folder / f"output-{node}",
            environment={
                "MASTER_ADDR": self.nodes.address(0),
                "MASTER_PORT": "29500",
                "NODE_RANK": str(node),
                "OMP_NUM_THREADS": "1",
                "XDG_CACHE_HOME": str(self.folder / "cache"),
            },
        )

    def said(self, node: int) -> str:
        return (self.folder / f"output-{node}").read_text()

    def losses(self) -> list[float]:
        file = self.folder / "runs/tiny/metrics.jsonl"
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_steps(self, count: int) -> None:
        self.wait_until(lambda: len(self.losses()) >= count)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.said(node) for node in (0, 1))
            time.sleep(0.05)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_node_is_cut_off_and_comes_back(nodes: Network, tmp_path: Path) -> None:
    job = Job(nodes, tmp_path)
    first, second = job.start(0), job.start(1)
    try:
        job.wait_for_steps(12)
        assert "on data 2" in job.said(0)
        cut_off = descendants(second)

        nodes.unplug(1)
        job.wait_until(lambda: "on one process" in job.said(0))
        steps = len(job.losses())
        job.wait_for_steps(steps + 5)
        second.wait(PATIENCE)
        assert "did not meet" in job.said(1) or "was lost" in job.said(1)
        assert not psutil.wait_procs(cut_off, timeout=10)[1]

        nodes.plug_in(1)
        second = job.start(1)
        job.wait_until(lambda: job.said(0).count("on data 2") == 2)
        steps = len(job.losses())
        job.wait_for_steps(steps + 5)
    finally:
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
        for process in (first, second):
            process.wait(PATIENCE)
    steps = len(job.losses())
    assert job.losses() == pytest.approx(undisturbed_losses(job, steps), abs=1e-5)


def undisturbed_losses(job: Job, steps: int) -> list[float]:
    """The losses of as many steps of the same run on one process."""
    alone = job.folder / "alone"
    command = [sys.executable, "-m", "weft", "train", "tiny.yaml", "parallel.data=1", f"report.directory={alone}"]
    process = subprocess.Popen(command, cwd=job.folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    file = alone / "metrics.jsonl"
    job.wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") >= steps)
    process.terminate()
    process.wait(PATIENCE)
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()][:steps]
