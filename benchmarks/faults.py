"""Faults at random moments of training runs, and what they cost: a table of what was done and what was lost.

    python benchmarks/faults.py                           # 200 faults, an hour on 2 cores
    python benchmarks/faults.py --faults 10 --seed 7
    python benchmarks/faults.py --faults 3 --only unplugged

A run trains a tiny Llama on two ranks of one layout with `weft train --max-restarts`. Faults hit it at moments that the
seed draws, in training, in a save, or while it starts; what ends the launcher too is followed by the same command once
more. Every fourth run has its ranks on two or four nodes, which are network namespaces, and loses one of them. A
run is lost when it does not end with the losses of an undisturbed one, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from disturbed import (
    EVERY,
    FOUR,
    LAYOUTS,
    MARK,
    PATIENCE,
    LostError,
    NodesRun,
    Run,
    count_survivors,
    lost_checkpoints,
    prepare,
    send,
    small_disk,
    undisturbed_losses,
    wait_for,
    wait_for_training,
    wait_until,
)
from nodes import NotPermittedError, network

__all__ = ["MARK", "count_survivors", "prepare", "undisturbed_losses", "wait_until"]
NODE_FAULTS = 3
FREE = 400_000  # bytes that a full disk may still have: less than a checkpoint takes


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


def unplug(run: Run, choose: random.Random) -> None:
    assert isinstance(run, NodesRun)
    run.unplug(choose.randrange(1, run.network.count))


def fill_disk(run: Run, choose: random.Random) -> None:
    """Leave the disk so full that a save fails, until one has said so."""
    filler, heard = run.folder / "runs/run/filler", len(run.said())
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while (left := shutil.disk_usage(filler.parent).free - choose.randrange(FREE)) > 0:
            file.write(bytes(min(left, 2**20)))
    wait_for(run, lambda: "training goes on without it" in run.said()[heard:])
    filler.unlink()


def doom(run: Run, choose: random.Random, launcher: str = "") -> bool:
    """Kill a rank at a file operation of a save; False when the run ends before."""
    order = run.folder / Path("doom.next")
    order.write_text(f"{choose.randrange(2)} {choose.randrange(1, 80)} {launcher or 'rank'}", encoding="utf-8")
    told = order.rename(run.folder / "doom")
    wait_for(run, lambda: not told.exists())
    return not told.exists()


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what is done, in which moments, how often it is drawn, and what it takes.

    `strike` returns False where the run came to its end before. `ends`: `ranks`, the `launcher` too, or `nothing`.
    """

    name: str
    strike: Callable[[Run, random.Random], bool | None]
    moment: str = "training"
    weight: int = 10
    ends: str = "ranks"
    takes: str = ""


KINDS = (
    Kind("a rank killed", strike_rank, weight=24),
    Kind("a rank killed in a save", strike_rank, moment="save", weight=16),
    Kind("a rank killed while it starts", strike_rank, moment="start"),
    Kind("the launcher killed", kill_launcher, ends="launcher", weight=12),
    Kind("the whole job killed", kill_everything, ends="launcher", weight=12),
    Kind("the whole job killed in a save", kill_everything, moment="save", ends="launcher", weight=12),
    Kind("the job told to end (SIGTERM)", terminate, ends="launcher"),
    Kind("the job killed, then a bit of a checkpoint flipped", flip_bit, moment="saved", ends="launcher", weight=8),
    Kind("the job killed, then a checkpoint truncated", truncate, moment="saved", ends="launcher", weight=6),
    Kind("the job killed, then a checkpoint's file removed", remove_file, moment="saved", ends="launcher", weight=4),
    Kind("a rank stopped (SIGSTOP)", partial(strike_rank, number=signal.SIGSTOP), weight=6),
    Kind("a rank killed at a file operation of a save", doom, moment="now", weight=14),
    Kind(
        "the whole job killed at a file operation of a save",
        partial(doom, launcher="launcher"),
        moment="now",
        weight=14,
        ends="launcher",
    ),
    Kind("the disk full (ENOSPC)", fill_disk, weight=8, ends="nothing", takes="disk"),
    Kind("a node of two unplugged", unplug, weight=0, takes="2 nodes"),
    Kind("a node of four unplugged", unplug, weight=0, takes="4 nodes"),
)


@dataclass
class Tally:
    """What was done and what came of it."""

    struck: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    runs: int = 0
    runs_lost: list[str] = field(default_factory=list)
    curves_unequal: list[str] = field(default_factory=list)
    checkpoints_lost: int = 0
    damaged: int = 0
    unnoticed: int = 0
    orphans: int = 0
    lacking: dict[str, str] = field(default_factory=dict)

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
        metrics, steps = run.metrics_file, run.steps
        if kind.strike(run, choose) is False:
            break
        tally.struck[kind.name] += 1
        if kind.ends == "launcher" or (run.over and run.process.returncode):
            run.process.wait(PATIENCE)
            tally.orphans += count_survivors(run.folder)
            tally.checkpoints_lost += lost_checkpoints(run, before)
            run.start()
        if kind.ends == "nothing":
            wait_for(run, lambda steps=steps: run.steps > steps)  # type: ignore[misc]
        else:
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
    if kind.moment == "now":
        return not run.over
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


# ---------------------------------------------------------------- all runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=8, help="faults in one run")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name has this text")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.only in kind.name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes away networks and mounts
    with tempfile.TemporaryDirectory(prefix="weft-faults-") as folder:
        tally = strike(Path(folder), faults=options.faults, seed=options.seed, per_run=options.per_run, kinds=kinds)
    print(table(tally, options.seed))
    bad = (tally.runs_lost, tally.curves_unequal, tally.checkpoints_lost, tally.unnoticed, tally.orphans)
    return int(any(bad))


def strike(folder: Path, *, faults: int, seed: int, per_run: int, kinds: Sequence[Kind] = KINDS) -> Tally:
    """Disturb runs until so many faults have struck."""
    choose, tally = random.Random(seed), Tally()
    undisturbed: dict[str, list[str]] = {}
    while tally.faults < faults:
        nodes = nodes_of_next(kinds, choose, tally)
        layout = FOUR if nodes == 4 else choose.choice(LAYOUTS)
        if layout not in undisturbed:
            undisturbed[layout] = undisturbed_losses(folder, layout)
        if nodes > 1:
            drawn = [kind for kind in kinds if kind.takes == f"{nodes} nodes"] * NODE_FAULTS
        else:
            possible = [kind for kind in kinds if kind.takes not in tally.lacking]
            weights = [kind.weight for kind in possible]
            if not any(weights):
                break  # this machine has nothing that these kinds take
            drawn = choose.choices(possible, weights, k=min(per_run, faults - tally.faults))
        with ExitStack() as place:
            small = any(kind.takes == "disk" for kind in drawn)
            run = place_run(folder / f"run-{tally.runs}", layout, nodes, small, place, tally)
            if run is None:
                continue
            tally.runs += 1
            try:
                disturbed_run(run, drawn, choose, tally)
                if difference := first_difference(run.losses(), undisturbed[layout]):
                    tally.curves_unequal.append(f"run {tally.runs - 1} ({layout}, {nodes} nodes): {difference}")
                tally.checkpoints_lost += lost_checkpoints(run, [])
            except (LostError, subprocess.TimeoutExpired) as error:
                tally.runs_lost.append(f"run {tally.runs - 1}: {error}")
                run.process.kill()
            tally.orphans += count_survivors(run.folder)
        print(f"run {tally.runs}: {tally.faults} of {faults} faults", file=sys.stderr, flush=True)
    return tally


def first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """Between two runs' losses, in words; empty where they are the same."""
    for step, (own, wanted) in enumerate(zip(found, expected, strict=False), start=1):
        if own != wanted:
            return f"step {step} has the loss {own}, undisturbed {wanted}"
    return "" if len(found) == len(expected) else f"{len(found)} steps are told of, undisturbed {len(expected)}"


def nodes_of_next(kinds: Sequence[Kind], choose: random.Random, tally: Tally) -> int:
    """On how many nodes the next run is: every fourth on several, where this machine has them and a kind takes them."""
    several = [int(kind.takes.split()[0]) for kind in kinds if kind.takes.endswith("nodes")]
    if not several or "nodes" in tally.lacking:
        return 1
    return choose.choice(several) if tally.runs % 4 == 3 or len(several) == len(kinds) else 1


def place_run(folder: Path, layout: str, nodes: int, small: bool, place: ExitStack, tally: Tally) -> Run | None:
    """A run on so many nodes, or on a small disk; None where this machine has none, which is noted."""
    try:
        run = prepare(folder, layout, place.enter_context(network(nodes)) if nodes > 1 else None)
        if small:
            place.enter_context(small_disk(run))
        return run
    except NotPermittedError as error:
        tally.lacking["nodes"] = str(error)
    except PermissionError as error:
        tally.lacking["disk"] = f"no mounts: {error}"
        shutil.rmtree(folder)
    return None


def table(tally: Tally, seed: int) -> str:
    """The result as Markdown."""
    lines = ["| fault | times | seconds until it trains again (median) |", "|---|---:|---:|"]
    for name, times in sorted(tally.struck.items()):
        lines.append(f"| {name} | {times} | {statistics.median(tally.seconds[name] or [0.0]):.1f} |")
    lines += [
        f"| all, seed {seed} | {tally.faults} | |",
        "",
        f"{tally.runs} runs: {len(tally.runs_lost)} lost, {len(tally.curves_unequal)} with other losses than "
        f"undisturbed, {tally.checkpoints_lost} valid checkpoints lost, {tally.unnoticed} of {tally.damaged} damaged "
        f"not named, {tally.orphans} orphan processes.",
        *(f"Left out, since this machine has no {name}: {reason}" for name, reason in tally.lacking.items()),
        *tally.runs_lost,
        *tally.curves_unequal,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
