"""The planner against the engine: predicted and measured step time of the demo's model in layouts on 4 CPU processes.

    weft calibrate configs/demo.yaml --output runs/machine.yaml
    python benchmarks/planning.py --cluster runs/machine.yaml

All layouts are trained in turn, several rounds; medians. Prints both times, the error, and Spearman's rank correlation.
Where the ranks share cores, `cores` is what a step takes of them, CPU seconds of all ranks per core: on a machine with
nothing else to do it is the measured time less what all ranks wait at once. When the machine is busy, the planner is
judged by it, and the page says so.
"""

import argparse
import os
import statistics
import time
from typing import Any

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


def measure(rounds: int, steps: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Median seconds of a step in each layout, CPU seconds of this rank, and wall time per CPU time."""
    torch.set_num_threads(1)
    engines: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        settings = settings_of(layout)
        parallel = settings.parallel
        mesh = build_mesh(pipeline=parallel.pipeline, data=int(parallel.data), tensor=parallel.tensor)
        engine = Engine(model_config(settings.model), settings, mesh)
        shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length)
        tokens = torch.randint(engine.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        engine.step(0, tokens, tokens)
        engines[name] = (engine, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    worked: dict[str, list[float]] = {name: [] for name in engines}
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        for name, (engine, tokens) in engines.items():
            for step in range(steps):
                dist.barrier()
                start, before = time.perf_counter(), time.process_time()
                engine.step(step + 1, tokens, tokens)
                worked[name].append(time.process_time() - before)
                dist.barrier()
                seconds[name].append(time.perf_counter() - start)
    busy = (time.perf_counter() - wall) / (time.process_time() - cpu)
    dist.destroy_process_group()
    medians, cpu_medians = ({name: statistics.median(x) for name, x in of.items()} for of in (seconds, worked))
    return medians, cpu_medians, busy


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="file of weft calibrate")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all layouts (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each layout in a round (default 3)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    predicted = predict(options.cluster)
    of_ranks = on_ranks(RANKS, measure, options.rounds, options.steps)
    measured, _, busy = of_ranks[0]
    cores = min(RANKS, cores_here())
    shared = {name: sum(worked[name] for _, worked, _ in of_ranks.values()) / cores for name in LAYOUTS}
    is_busy = busy > BUSY * RANKS / cores
    judge = shared if is_busy else measured
    print(f"{'layout':<42}{'predicted':>11}{'measured':>11}{'cores':>11}{'error':>8}")
    for name in LAYOUTS:
        times = "".join(f"{seconds[name] * 1e3:>8.0f} ms" for seconds in (predicted, measured, shared))
        print(f"{name:<42}{times}{predicted[name] / judge[name] - 1:>8.1%}")
    errors = [abs(predicted[name] / judge[name] - 1) for name in LAYOUTS]
    order = spearman([predicted[name] for name in LAYOUTS], [judge[name] for name in LAYOUTS])
    print(f"\nSpearman {order:.2f}, mean error {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}")
    if is_busy:
        print(
            f"The ranks waited for a core, {busy:.2f} s per second of work ({RANKS / cores:.2f} expected); "
            "judged by the time of the cores."
        )


if __name__ == "__main__":
    main()
