"""The planner against the engine: predicted and measured step time of the demo's model in layouts on 4 CPU processes.

    weft calibrate configs/demo.yaml batch.micro_size=4 --output runs/machine.yaml
    python benchmarks/planning.py --cluster runs/machine.yaml

The layouts are trained in turn, several rounds, each round in processes of its own; medians.
Prints both times, the error, and Spearman's rank correlation, without the layouts that `weft calibrate` has timed.
Those tell how much faster or slower the machine is than when it was calibrated.
Where the ranks share cores, `cores` is what a step takes of them, CPU seconds of all ranks per core: on a machine with
nothing else to do it is the measured time less what cores are idle. When the machine is busy, nobody is judged.
"""

import argparse
import os
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ranks import on_ranks

from weft.launch.calibrate.measure import cores_here
from weft.launch.engine import Engine
from weft.launch.plan.ask import layout_as_set, space_of
from weft.launch.plan.cluster import load_cluster
from weft.launch.plan.step import step_time
from weft.launch.settings import Settings, load_settings, resolved
from weft.model.config import model_config
from weft.parallel import build_mesh

RANKS, BUSY = 4, 1.3
CALIBRATED = ("data 4", "tensor 2 × data 2")  # which weft calibrate has trained itself
LAYOUTS: dict[str, list[str]] = {
    "data 4": ["tensor=1", "pipeline=1"],
    "data 4, full recompute": ["tensor=1", "pipeline=1", "recompute=full"],
    "tensor 2 × data 2": ["tensor=2", "pipeline=1"],
    "tensor 2 × data 2, full recompute": ["tensor=2", "pipeline=1", "recompute=full"],
    "tensor 2 × data 2, not sequence parallel": ["tensor=2", "pipeline=1", "sequence_parallel=false"],
    "pipeline 2 × data 2": ["tensor=1", "pipeline=2"],
    "pipeline 2 × data 2, full recompute": ["tensor=1", "pipeline=2", "recompute=full"],
    "pipeline 2 × data 2, zb-h1": ["tensor=1", "pipeline=2", "schedule=zb-h1"],
    "pipeline 4": ["tensor=1", "pipeline=4"],
    "pipeline 4, gpipe": ["tensor=1", "pipeline=4", "schedule=gpipe"],
    "pipeline 4, full recompute": ["tensor=1", "pipeline=4", "recompute=full"],
    "tensor 2 × pipeline 2": ["tensor=2", "pipeline=2"],
    "tensor 2 × pipeline 2, full recompute": ["tensor=2", "pipeline=2", "recompute=full"],
}


def settings_of(layout: list[str]) -> Settings:
    overrides = [f"parallel.{key}" for key in layout] + ["batch.micro_size=4", "cluster.device=cpu"]
    return resolved(load_settings("configs/demo.yaml", overrides), RANKS)


class Times(NamedTuple):
    """Of one rank and step: seconds that pass until all ranks are done, and CPU seconds."""

    wall: float
    cpu: float


def measure(steps: int) -> dict[str, list[Times]]:
    """So many steps of each layout on this rank, after one that is not counted."""
    torch.set_num_threads(1)
    return {name: _measure(overrides, steps) for name, overrides in LAYOUTS.items()}


def _measure(overrides: list[str], steps: int) -> list[Times]:
    settings = settings_of(overrides)
    parallel = settings.parallel
    mesh = build_mesh(pipeline=parallel.pipeline, data=int(parallel.data), tensor=parallel.tensor)
    engine = Engine(model_config(settings.model), settings, mesh)
    shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length)
    tokens = torch.randint(engine.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(steps + 1):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        engine.step(step, tokens, tokens)
        worked = time.process_time() - cpu
        dist.barrier()
        found.append(Times(time.perf_counter() - wall, worked))
    return found[1:]


def measure_in_turn(rounds: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of each layout the median seconds of a step, and of what it takes of the cores."""
    found: dict[str, list[tuple[Times, ...]]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        of_ranks = on_ranks(RANKS, measure, steps)
        for name, own in found.items():
            own += zip(*(rank[name] for rank in of_ranks.values()), strict=True)
    cores = min(RANKS, cores_here())
    measured = {name: statistics.median(ranks[0].wall for ranks in own) for name, own in found.items()}
    shared = {
        name: statistics.median(sum(rank.cpu for rank in ranks) for ranks in own) / cores for name, own in found.items()
    }
    return measured, shared


def predict(cluster_file: str) -> dict[str, float]:
    cluster = load_cluster(cluster_file)
    found = {}
    for name, overrides in LAYOUTS.items():
        settings = settings_of(overrides)
        space = space_of(settings, cluster)
        layout = layout_as_set(settings, space)
        assert layout is not None
        found[name] = step_time(space.shape, space.job, layout, space.recipe, cluster).total
    return found


def spearman(left: list[float], right: list[float]) -> float:
    """Pearson's correlation of the ranks (Spearman 1904)."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def print_times(predicted: dict[str, float], measured: dict[str, float], shared: dict[str, float]) -> None:
    print(f"{'layout':<42}{'predicted':>11}{'measured':>11}{'cores':>11}{'error':>8}")
    for name in LAYOUTS:
        times = "".join(f"{seconds[name] * 1e3:>8.0f} ms" for seconds in (predicted, measured, shared))
        error = "timed" if name in CALIBRATED else f"{predicted[name] / measured[name] - 1:.1%}"
        print(f"{name:<42}{times}{error:>8}")


def print_judgement(predicted: dict[str, float], measured: dict[str, float]) -> None:
    judged = [name for name in LAYOUTS if name not in CALIBRATED]
    drift = statistics.mean(measured[name] / predicted[name] for name in CALIBRATED)
    order = spearman([predicted[name] for name in judged], [measured[name] for name in judged])
    print(f"\nSpearman of {len(judged)} layouts {order:.2f}")
    for title, factor in (("as calibrated", 1.0), (f"{drift:.2f} times as long, as those that were timed", drift)):
        errors = [abs(factor * predicted[name] / measured[name] - 1) for name in judged]
        print(f"{title}: error mean {statistics.mean(errors):.1%}, most {max(errors):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="file of weft calibrate")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all layouts (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each layout in a round (default 4)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    predicted = predict(options.cluster)
    measured, shared = measure_in_turn(options.rounds, options.steps)
    print_times(predicted, measured, shared)
    busy = sum(measured.values()) / sum(shared.values())
    if busy > BUSY:
        print(f"\nThe cores worked for others, {busy:.2f} s passed per second of their work: nothing is judged.")
    else:
        print_judgement(predicted, measured)


if __name__ == "__main__":
    main()
