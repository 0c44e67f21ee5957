"""Data parallelism beside what torch and DeepSpeed have: the same layers, batches and machine, in turns.

    python benchmarks/data.py                       # all three comparisons, medians of 15 steps
    python benchmarks/data.py --steps 5 replicas

replicas     weft's replicas beside torch's DistributedDataParallel, data 2
zero         ZeRO 1 beside DistributedDataParallel with torch's ZeroRedundancyOptimizer, data 2
pipeline     ZeRO 1 under 1F1B beside DeepSpeed's PipelineEngine, pipeline 2 × data 2

Every rank is a process with one thread, over gloo. A step is four microbatches, clipping and AdamW. Times are of the
slowest rank.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import layouts
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.model.decoder import DecoderStage
from weft.parallel import PipelineExecutor, PipelineStage, build_mesh, build_schedule
from weft.parallel.data.gradients import total_norm

MICROBATCHES, ROWS, LENGTH, RATE, CLIP = 4, 2, 128, 1e-3, 1.0
MODEL = layouts.MODEL | {"max_position_embeddings": LENGTH}
WIDTH, LAYERS = 256, 8
Step = Callable[[], object]


def replicas(zero: int) -> dict[str, Step]:
    """Both train the Llama of `MODEL` on the same tokens."""
    mesh = build_mesh(data=2)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, 512, (MICROBATCHES * ROWS, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    settings = build_settings(
        {
            "name": "data",
            "model": MODEL,
            "parallel": {"data": 2, "zero": zero},
            "batch": {"global_size": 2 * MICROBATCHES * ROWS, "micro_size": ROWS},
            "train": {"optimizer": {"learning_rate": RATE, "clip_grad_norm": CLIP}, "schedule": {"warmup_steps": 0}},
            "corpus": {"sequence_length": LENGTH},
        }
    )
    engine = Engine(model_config(MODEL), settings, mesh)
    model = DistributedDataParallel(DecoderStage(model_config(MODEL), range(4), mesh=mesh["tensor"]))
    if zero:
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def by_torch() -> None:
        optimizer.zero_grad()
        for number, (x, y) in enumerate(zip(inputs.split(ROWS), targets.split(ROWS), strict=True)):
            with nullcontext() if number == MICROBATCHES - 1 else model.no_sync():
                logits = model(x)
                (nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()) / MICROBATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return {"weft": lambda: engine.step(0, inputs, targets), "torch": by_torch}


class Block(nn.Module):
    """x + W₂ gelu(W₁ norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


def pipeline() -> dict[str, Step]:
    """Both train the same `LAYERS` blocks, half of them on each stage."""
    mesh = build_mesh(pipeline=2, data=2)
    torch.manual_seed(1)
    batch = torch.randn(MICROBATCHES, 64, WIDTH)
    return {"weft": weft_pipeline(mesh, make_layers(), batch), "DeepSpeed": deepspeed_pipeline(make_layers(), batch)}


def make_layers() -> list[Block]:
    torch.manual_seed(2)
    return [Block() for _ in range(LAYERS)]


def weft_pipeline(mesh: Any, layers: list[Block], batch: Tensor) -> Step:
    from weft.parallel.data.zero_deepspeed import DeepSpeedReplicas

    rank = mesh["pipeline"].get_local_rank()
    half = LAYERS // 2
    stage = PipelineStage(nn.Sequential(*layers[rank * half : (rank + 1) * half]), rank)
    executor = PipelineExecutor(
        build_schedule("1f1b", 2, MICROBATCHES), [stage], mesh["pipeline"], nn.functional.mse_loss, timeout=120
    )
    sharded = DeepSpeedReplicas(
        [stage],
        [{"params": list(stage.module.parameters())}],
        lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=True),
        mesh["data"],
        partition_gradients=False,
    )

    def step() -> None:
        sharded.begin()
        executor.step(list(batch), list(batch))
        sharded.finish()
        gradients = [sharded.gradient(piece) for piece in sharded.pieces]
        norm = float(total_norm(gradients, (mesh["pipeline"], mesh["data"])))
        torch._foreach_mul_(gradients, min(1.0, CLIP / (norm + 1e-6)))
        sharded.step()

    return step


def deepspeed_pipeline(layers: list[Block], batch: Tensor) -> Step:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    model = PipelineModule(
        [*layers], num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform", topology=None
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=RATE, fused=True),
        config={
            "train_micro_batch_size_per_gpu": batch.shape[1],
            "gradient_accumulation_steps": MICROBATCHES,
            "gradient_clipping": CLIP,
            "steps_per_print": 10**12,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(repeat(batch[0]), repeat(batch[0]), strict=False)
    return lambda: engine.train_batch(data_iter=pairs)


COMPARISONS: dict[str, tuple[int, Callable[[], dict[str, Step]]]] = {
    "replicas": (2, lambda: replicas(0)),
    "zero": (2, lambda: replicas(1)),
    "pipeline": (4, pipeline),
}


def compare(name: str, steps: int) -> str:
    """On every rank: the contenders in turns; the line to print."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    contenders = COMPARISONS[name][1]()
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    for turn in range(steps + 2):
        for who, step in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if turn > 1:
                seconds[who].append(float(taken))
    ours, theirs = (1e3 * statistics.median(times) for times in seconds.values())
    spread = " ".join(f"{who} {1e3 * min(times):.1f} … {1e3 * max(times):.1f}" for who, times in seconds.items())
    return f"{name:<10} {ours:9.1f} ms {theirs:9.1f} ms {ours / theirs:6.2f} ×   {spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", metavar="comparison", help=f"of {', '.join(COMPARISONS)}; all")
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'':<10} {'weft':>12} {'other':>12} {'ratio':>8}   fastest … slowest step")
    for name in arguments.comparisons or COMPARISONS:
        print(on_ranks(COMPARISONS[name][0], compare, name, arguments.steps)[0], flush=True)


if __name__ == "__main__":
    main()
