"""Training speed of one small Llama in several layouts, side by side: tokens per second and the ideal beside each.

    python benchmarks/layouts.py                 # three interleaved rounds, medians
    python benchmarks/layouts.py --rounds 1 --steps 3

Every rank is a process with one thread, over gloo. The ideal of a layout is what one process does, times the cores
that the layout uses, less the pipeline's bubble.
"""

import argparse
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from ranks import on_ranks

from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh, build_schedule, simulate_schedule

MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
SEQUENCE, MICRO_SIZE, MICROBATCHES = 256, 4, 8


class Layout(NamedTuple):
    """Sizes of the axes."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def name(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in self._asdict().items() if size > 1]
        return " × ".join(sizes) or "one process"

    @property
    def microbatches(self) -> int:
        """Of each replica: the global batch is the same in every layout."""
        return MICROBATCHES // self.data


LAYOUTS = (Layout(), Layout(data=2), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2))


def train(layout: Layout, steps: int, sequence_parallel: bool) -> float:
    """Median seconds of a step, on one rank of the layout."""
    torch.set_num_threads(1)
    settings = build_settings(
        {
            "name": "benchmark",
            "model": MODEL,
            "parallel": {**layout._asdict(), "sequence_parallel": sequence_parallel},
            "batch": {"global_size": MICRO_SIZE * MICROBATCHES, "micro_size": MICRO_SIZE},
            "corpus": {"sequence_length": SEQUENCE},
        }
    )
    engine = Engine(model_config(MODEL), settings, build_mesh(**layout._asdict()))
    rows = MICRO_SIZE * layout.microbatches
    tokens = torch.randint(0, MODEL["vocab_size"], (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    seconds = []
    for step in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        engine.step(step, tokens[:, :-1], tokens[:, 1:])
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return statistics.median(seconds[1:])


def measure(layout: Layout, steps: int, sequence_parallel: bool) -> float:
    """Tokens per second of a layout, from one start of its processes."""
    seconds = on_ranks(layout.ranks, train, layout, steps, sequence_parallel)
    return MICRO_SIZE * MICROBATCHES * SEQUENCE / max(seconds.values())


def bubble(layout: Layout) -> float:
    """Idle share of the layout's schedule, forward and backward in the ratio 1 : 2, communication free."""
    return simulate_schedule(build_schedule("1f1b", layout.pipeline, layout.microbatches)).bubble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each layout, interleaved (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each start (default 5)")
    parser.add_argument("--sequence-parallel", action="store_true", help="with sequence parallelism on tensor ranks")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = os.cpu_count() or 1
    speeds: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(options.rounds):
        for layout in LAYOUTS:
            speeds[layout].append(measure(layout, options.steps, options.sequence_parallel))
    single = statistics.median(speeds[LAYOUTS[0]])
    print(f"{'layout':<24}{'tokens/s':>10}{'ideal':>10}{'share':>8}   (min … max; {cores} cores)")
    for layout, values in speeds.items():
        speed = statistics.median(values)
        ideal = single * min(layout.ranks, cores) * (1 - bubble(layout))
        spread = f"({min(values):,.0f} … {max(values):,.0f})"
        print(f"{layout.name:<24}{speed:>10,.0f}{ideal:>10,.0f}{speed / ideal:>8.2f}   {spread}")


if __name__ == "__main__":
    main()
