"""What `train.compile` gains in one process: steps of a small Llama, and of a GPT-2 with dropout, without and with it.

    python benchmarks/compiled.py               # ten interleaved steps of each, medians
    python benchmarks/compiled.py --steps 3

One thread on a CPU, float32; the Llama is that of layouts.py, and the GPT-2 is as large. The time of the first step
includes compiling, unless torch has kept the code from before (TORCHINDUCTOR_CACHE_DIR).
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from layouts import MICRO_SIZE, MICROBATCHES, MODEL, SEQUENCE

from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh

DROPOUT = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
SIZES = {"vocab_size": 512, "n_embd": 256, "n_inner": 1024, "n_layer": 4, "n_head": 8, "n_positions": SEQUENCE}
MODELS: dict[str, dict[str, Any]] = {"Llama": MODEL, "GPT-2, dropout 0.1": {"model_type": "gpt2", **SIZES, **DROPOUT}}


def engine(model: dict[str, Any], *, compiled: bool) -> Engine:
    settings = build_settings(
        {
            "name": "compiled",
            "model": model,
            "parallel": {"data": 1},
            "batch": {"global_size": MICRO_SIZE * MICROBATCHES, "micro_size": MICRO_SIZE},
            "train": {"compile": compiled},
            "corpus": {"sequence_length": SEQUENCE},
        }
    )
    return Engine(model_config(model), settings, build_mesh())


def measure(name: str, model: dict[str, Any], steps: int) -> None:
    """Print the steps of both ways and how far their losses are apart."""
    rows = torch.randint(0, 512, (MICRO_SIZE * MICROBATCHES, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    engines = [engine(model, compiled=compiled) for compiled in (False, True)]
    seconds: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for step in range(steps + 1):
        for which, own in enumerate(engines):
            start = time.perf_counter()
            losses[which].append(own.step(step, rows[:, :-1], rows[:, 1:]).loss)
            seconds[which].append(time.perf_counter() - start)
    apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print(f"{name}: losses differ by at most {apart:.0e}; compiling took {seconds[1][0] - seconds[0][0]:.0f} s")
    for label, times in zip(("without", "with"), seconds, strict=True):
        median = statistics.median(times[1:])
        print(f"  {label:<8}{1e3 * median:>8.0f} ms  ({1e3 * min(times[1:]):.0f} … {1e3 * max(times[1:]):.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, model in MODELS.items():
            measure(name, model, options.steps)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
