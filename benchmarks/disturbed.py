"""Training runs that a benchmark disturbs: how they are started, watched and found whole."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from nodes import Network

STEPS, EVERY, TIMEOUT = 48, 4, 5
MARK, DOOM = "WEFT_FAULTS", "WEFT_DOOM"
HOOK = Path(__file__).with_name("doom")
SMALL_DISK = 6 * 2**20
LAYOUTS = ("pipeline", "data", "tensor")
FOUR = "pipeline-data"  # of four ranks
PATIENCE = 300.0
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SETTINGS: dict[str, Any] = {
    "name": "run",
    "model": SIZES | {"model_type": "llama", "intermediate_size": 48, "max_position_embeddings": 32},
    "batch": {"global_size": 8, "micro_size": 2},
    "train": {"steps": STEPS, "timeout": TIMEOUT, "evaluate_every": 0, "evaluate_sequences": 4},
    "corpus": {"path": "text.txt", "sequence_length": 16},
    "checkpoint": {"every": EVERY, "keep": 3},
    "cluster": {"device": "cpu"},
}


class LostError(Exception):
    """A run did not survive."""


@dataclass
class Run:
    """One training run in a folder of its own, and the `process` of the launcher that works on it now."""

    folder: Path
    layout: str
    process: subprocess.Popen[bytes] = field(init=False)
    damaged: list[Path] = field(default_factory=list)

    def start(self) -> None:
        """Start the command, or start it again."""
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment(self.folder), stdout=output, stderr=output
            )

    @property
    def command(self) -> list[str]:
        train = [sys.executable, "-m", "weft", "train", "--max-restarts", "1000", "settings.json"]
        return [*train, *(f"parallel.{axis}=2" for axis in self.layout.split("-"))]

    @property
    def metrics(self) -> Path:
        return self.folder / "runs/run/metrics.jsonl"

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run now, by their process numbers."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(children, key=lambda child: child.pid)

    @property
    def steps(self) -> int:
        """Steps that are written down."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    @property
    def metrics_file(self) -> int:
        """The number of the file in which steps are written down; every start of the ranks makes a new one."""
        return self.metrics.stat().st_ino if self.metrics.exists() else 0

    def losses(self) -> list[str]:
        """Every loss as it is written, which is every bit of it."""
        return [repr(json.loads(line)["loss"]) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "runs/run/checkpoints").glob("step-*"))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "runs/run/checkpoints").glob(".*"))

    def said(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")


@dataclass
class NodesRun(Run):
    """A run with a rank on each node of a network; `process` is the launcher of the first, which is kept."""

    network: Network = field(kw_only=True)
    launchers: list[subprocess.Popen[bytes]] = field(init=False)

    def start(self) -> None:
        self.launchers = [self.start_node(node) for node in range(self.network.count)]
        self.process = self.launchers[0]

    def start_node(self, node: int) -> subprocess.Popen[bytes]:
        place = {"MASTER_ADDR": self.network.address(0), "MASTER_PORT": "29500", "NODE_RANK": str(node)}
        return self.network.popen(
            node,
            [*self.command, f"cluster.nodes={self.network.count}"],
            folder=self.folder,
            output=self.folder / "output.txt",
            environment=added_environment(self.folder) | place,
        )

    def unplug(self, node: int) -> None:
        """Cut a node off until its launcher has given up, then start it again."""
        self.network.unplug(node)
        try:
            self.launchers[node].wait(PATIENCE)
        finally:
            self.network.plug_in(node)
        self.launchers[node] = self.start_node(node)


def environment(folder: Path) -> dict[str, str]:
    return os.environ | added_environment(folder)


def added_environment(folder: Path) -> dict[str, str]:
    paths = [str(HOOK), os.environ.get("PYTHONPATH", "")]
    return {
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        MARK: str(folder),
        DOOM: str(folder / "doom"),
    }


def send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def wait_for_training(run: Run, before: int) -> None:
    """Wait until other processes than those before, which began another file of metrics, have trained a step."""
    wait_for(run, lambda: run.metrics_file not in (before, 0))
    steps = run.steps
    wait_for(run, lambda: run.steps > steps)


def wait_for(run: Run, condition: Callable[[], bool]) -> None:
    """Wait for something that a run does, unless it ends before."""
    if not wait_until(lambda: run.over or condition()):
        raise LostError(f"it did not go on within {PATIENCE:g} s\n{run.said()[-2000:]}")


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.003)
    return True


def survivors(folder: Path) -> Iterator[psutil.Process]:
    """Processes of a run that are still there."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def count_survivors(folder: Path) -> int:
    """How many processes are left a moment after their launcher has ended; they are ended too."""
    wait_until(lambda: not any(survivors(folder)), seconds=5)
    left = list(survivors(folder))
    for process in left:
        send(process, signal.SIGKILL)
    return len(left)


def lost_checkpoints(run: Run, before: list[Path]) -> int:
    """Checkpoints that are damaged now, and the newest one of before when nothing as new is there."""
    damaged = sum(not is_whole(checkpoint) for checkpoint in run.checkpoints if checkpoint not in run.damaged)
    gone = bool(before) and (not run.checkpoints or run.checkpoints[-1] < before[-1])
    return damaged + gone


def is_whole(checkpoint: Path) -> bool:
    """Whether every file has the length and the checksum that the manifest tells."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        contents = {name: (checkpoint / name).read_bytes() for name in files}
    except (OSError, ValueError):
        return False
    return all(
        len(contents[name]) == told["bytes"] and f"{zlib.crc32(contents[name]):08x}" == told["crc32"]
        for name, told in files.items()
    )


@contextmanager
def small_disk(run: Run) -> Iterator[None]:
    """Put what the run writes on a disk of its own that is nearly too small.

    Raises:
        PermissionError: this machine lets nobody mount one.
    """
    place = run.folder / "runs/run"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError(str(error)) from None
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        wait_until(lambda: not any(survivors(run.folder)), seconds=5)
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def prepare(folder: Path, layout: str, network: Network | None = None) -> Run:
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    lines = (f"{n} times {n} is {n * n}, and that is all.\n" for n in range(400))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return Run(folder, layout) if network is None else NodesRun(folder, layout, network=network)


def undisturbed_losses(folder: Path, layout: str) -> list[str]:
    run = prepare(folder / f"undisturbed-{layout}", layout)
    run.start()
    if run.process.wait(PATIENCE):
        raise SystemExit(run.said())
    return run.losses()
