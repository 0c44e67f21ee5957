"""Faults at random moments of training runs, and what they cost: a table of what was done and what was lost.

    python benchmarks/faults.py                           # 200 faults, half an hour on 2 cores
    python benchmarks/faults.py --faults 10 --seed 7

A run trains a tiny Llama on two ranks of one layout with `weft train --max-restarts`. Faults hit it at moments that the
seed draws, in training, in a save, or while it starts; what ends the launcher too is followed by the same command once
more. A run is lost when it does not end with the losses of an undisturbed one, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

STEPS, EVERY, TIMEOUT = 48, 4, 5
MARK = "WEFT_FAULTS"
LAYOUTS = ("pipeline", "data", "tensor")
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
        command = [sys.executable, "-m", "weft", "train", "--max-restarts", "1000", "settings.json"]
        command += [f"parallel.{self.layout}=2"]
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment(self.folder), stdout=output, stderr=output
            )

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


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1", MARK: str(folder)}


def strike_rank(run: Run, choose: random.Random, number: signal.Signals = signal.SIGKILL) -> None:
    send(choose.choice(run.ranks()), number)


def kill_launcher(run: Run, choose: random.Random) -> None:
    run.process.kill()


def kill_everything(run: Run, choose: random.Random) -> None:
    for process in [*run.ranks(), psutil.Process(run.process.pid)]:
        send(process, signal.SIGKILL)


def terminate(run: Run, choose: random.Random) -> None:
    run.process.terminate()


def flip_bit(run: Run, choose: random.Random) -> None:
    file = damaged_file(run, choose)
    content = bytearray(file.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    file.write_bytes(content)


def truncate(run: Run, choose: random.Random) -> None:
    file = damaged_file(run, choose)
    os.truncate(file, choose.randrange(file.stat().st_size))


def remove_file(run: Run, choose: random.Random) -> None:
    damaged_file(run, choose, "*.safetensors").unlink()


def damaged_file(run: Run, choose: random.Random, pattern: str = "*") -> Path:
    """End the whole job, and pick a file of its newest checkpoint."""
    kill_everything(run, choose)
    run.process.wait(PATIENCE)
    count_survivors(run.folder)
    run.damaged.append(run.checkpoints[-1])
    return choose.choice(sorted(file for file in run.checkpoints[-1].glob(pattern) if file.stat().st_size))


def send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what is done, in which moments, and how often it is drawn."""

    name: str
    strike: Callable[[Run, random.Random], None]
    moment: str = "training"
    weight: int = 10
    ends_launcher: bool = False


KINDS = (
    Kind("a rank killed", strike_rank, weight=24),
    Kind("a rank killed in a save", strike_rank, moment="save", weight=16),
    Kind("a rank killed while it starts", strike_rank, moment="start"),
    Kind("the launcher killed", kill_launcher, ends_launcher=True, weight=12),
    Kind("the whole job killed", kill_everything, ends_launcher=True, weight=12),
    Kind("the whole job killed in a save", kill_everything, moment="save", ends_launcher=True, weight=12),
    Kind("the job told to end (SIGTERM)", terminate, ends_launcher=True),
    Kind("the job killed, then a bit of a checkpoint flipped", flip_bit, moment="saved", ends_launcher=True, weight=8),
    Kind("the job killed, then a checkpoint truncated", truncate, moment="saved", ends_launcher=True, weight=6),
    Kind("the job killed, then a checkpoint's file removed", remove_file, moment="saved", ends_launcher=True, weight=4),
    Kind("a rank stopped (SIGSTOP)", partial(strike_rank, number=signal.SIGSTOP), weight=6),
)


@dataclass
class Tally:
    """What was done and what came of it."""

    struck: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    runs: int = 0
    runs_lost: list[str] = field(default_factory=list)
    curves_unequal: int = 0
    checkpoints_lost: int = 0
    damaged: int = 0
    unnoticed: int = 0
    orphans: int = 0

    @property
    def faults(self) -> int:
        return self.struck.total()


def disturbed_run(run: Run, kinds: list[Kind], choose: random.Random, tally: Tally) -> None:
    """Train to the end, with faults of these kinds on the way."""
    run.start()
    for kind in kinds:
        if not wait_for_moment(run, kind, choose):
            break  # it came to its end before
        before, began = run.checkpoints, time.monotonic()
        said, damaged = len(run.said()), len(run.damaged)
        metrics = run.metrics_file
        kind.strike(run, choose)
        tally.struck[kind.name] += 1
        if kind.ends_launcher:
            run.process.wait(PATIENCE)
            tally.orphans += count_survivors(run.folder)
            tally.checkpoints_lost += lost_checkpoints(run, before)
            run.start()
        wait_for_training(run, metrics)
        tally.seconds[kind.name].append(time.monotonic() - began)
        for checkpoint in run.damaged[damaged:]:
            tally.damaged += 1
            tally.unnoticed += f"{checkpoint.name}" not in run.said()[said:]
    run.process.wait(PATIENCE)
    if run.process.returncode:
        raise LostError(run.said()[-2000:])


def wait_for_moment(run: Run, kind: Kind, choose: random.Random) -> bool:
    """Wait for the moment of the fault; False when the run ends before."""
    first, delay = run.steps, choose.uniform(0.0, 0.2)
    target = first + choose.randrange(1, 2 * EVERY)
    if kind.moment == "start":
        return strike_while_starting(run, choose)
    reached: Callable[[], bool] = run.saving if kind.moment == "save" else lambda: run.steps >= target
    if kind.moment == "saved":  # at least two checkpoints, since one will be damaged
        reached = lambda: run.steps >= target and len(run.checkpoints) > 1 and not run.saving()  # noqa: E731
    wait_for(run, reached)
    time.sleep(delay / 20 if kind.moment == "save" else delay)
    return not run.over and bool(run.ranks())


def strike_while_starting(run: Run, choose: random.Random) -> bool:
    """Have a rank killed that has trained already, so that the next one to be killed is starting again."""
    wait_for(run, lambda: run.steps > 0)
    if run.over:
        return False
    old = {process.pid for process in run.ranks()}
    strike_rank(run, choose)
    wait_for(run, lambda: bool({process.pid for process in run.ranks()} - old))
    time.sleep(choose.uniform(0.0, 3.0))
    return not run.over and bool(run.ranks())


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


# ---------------------------------------------------------------- all runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=8, help="faults in one run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-faults-") as folder:
        tally = strike(Path(folder), faults=options.faults, seed=options.seed, per_run=options.per_run)
    print(table(tally, options.seed))
    bad = (tally.curves_unequal, tally.checkpoints_lost, tally.unnoticed, tally.orphans)
    return int(bool(tally.runs_lost or any(bad)))


def strike(folder: Path, *, faults: int, seed: int, per_run: int, kinds: Sequence[Kind] = KINDS) -> Tally:
    """Disturb runs until so many faults have struck."""
    choose, tally = random.Random(seed), Tally()
    undisturbed: dict[str, list[str]] = {}
    while tally.faults < faults:
        layout = LAYOUTS[tally.runs % len(LAYOUTS)]
        if layout not in undisturbed:
            undisturbed[layout] = undisturbed_losses(folder, layout)
        drawn = choose.choices(kinds, [kind.weight for kind in kinds], k=min(per_run, faults - tally.faults))
        run = prepare(folder / f"run-{tally.runs}", layout)
        tally.runs += 1
        try:
            disturbed_run(run, drawn, choose, tally)
            tally.curves_unequal += run.losses() != undisturbed[layout]
            tally.checkpoints_lost += lost_checkpoints(run, [])
        except (LostError, subprocess.TimeoutExpired) as error:
            tally.runs_lost.append(f"run {tally.runs - 1}: {error}")
            run.process.kill()
        tally.orphans += count_survivors(run.folder)
        print(f"run {tally.runs}: {tally.faults} of {faults} faults", file=sys.stderr, flush=True)
    return tally


def prepare(folder: Path, layout: str) -> Run:
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    lines = (f"{n} times {n} is {n * n}, and that is all.\n" for n in range(400))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return Run(folder, layout)


def undisturbed_losses(folder: Path, layout: str) -> list[str]:
    run = prepare(folder / f"undisturbed-{layout}", layout)
    run.start()
    if run.process.wait(PATIENCE):
        raise SystemExit(run.said())
    return run.losses()


def table(tally: Tally, seed: int) -> str:
    """The result as Markdown."""
    lines = ["| fault | times | seconds until it trains again (median) |", "|---|---:|---:|"]
    for name, times in sorted(tally.struck.items()):
        lines.append(f"| {name} | {times} | {statistics.median(tally.seconds[name] or [0.0]):.1f} |")
    lines += [
        f"| all, seed {seed} | {tally.faults} | |",
        "",
        f"{tally.runs} runs: {len(tally.runs_lost)} lost, {tally.curves_unequal} with other losses than undisturbed, "
        f"{tally.checkpoints_lost} valid checkpoints lost, {tally.unnoticed} of {tally.damaged} damaged not named, "
        f"{tally.orphans} orphan processes.",
        *tally.runs_lost,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
