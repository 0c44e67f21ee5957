"""The executor against torch.distributed.pipelining: the same stages, schedules and machine, in turns.

    python benchmarks/pipeline.py                          # stages of 0.5 ms, two ranks, medians of 15 steps
    python benchmarks/pipeline.py --milliseconds 5 --recompute

Every rank is a process with one thread, over gloo. A stage is a few residual blocks of nn.Linear layers; its length is
the time of one microbatch's forward and backward. CPU time is that of the main thread, of the rank that uses most; the
last columns count how often a block runs forward per microbatch, and the longest simulated step with measured costs.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.utils.checkpoint import checkpoint

from weft.parallel import (
    PipelineExecutor,
    PipelineStage,
    ScheduleCosts,
    Timeline,
    build_mesh,
    build_schedule,
    simulate_schedule,
)

WIDTH, BLOCKS = 64, 2
PAIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}


class Block(nn.Module):
    """x + W₂ gelu(W₁ norm(x)), run again in the backward when `recompute`."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.recompute, self.runs = recompute, 0

    def _run(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.recompute else self._run(x)


@dataclass
class Contender:
    """One way to run a step, and what its steps have cost."""

    step: Callable[[], Timeline | None]
    blocks: list[Block]
    seconds: list[float]
    cpu_seconds: list[float]
    timeline: Timeline | None = None


def make_stage(index: int, recompute: bool) -> nn.Module:
    torch.manual_seed(index)
    return nn.Sequential(*(Block(recompute) for _ in range(BLOCKS)))


def rows_for(milliseconds: float) -> int:
    """Rows per microbatch at which forward and backward of a stage take so long, the same on every rank."""
    stage, rows = make_stage(0, False), 16
    while True:
        x = torch.randn(rows, WIDTH, requires_grad=True)
        times = []
        for _ in range(7):
            start = time.thread_time()
            stage(x).sum().backward()
            times.append(time.thread_time() - start)
        if min(times) * 1e3 >= milliseconds or rows >= 2**16:
            found = torch.tensor(rows)
            dist.broadcast(found, 0)
            return int(found)
        rows = rows * 5 // 4 + 1


def contend(name: str, ranks: int, microbatches: int, rows: int, recompute: bool) -> dict[str, Contender]:
    schedule = build_schedule(name, ranks, microbatches, 1 if name in ("gpipe", "1f1b") else 2)
    mesh = build_mesh(pipeline=ranks)["pipeline"]
    rank = mesh.get_local_rank()
    torch.manual_seed(99)
    batch, targets = torch.randn(2, microbatches * rows, WIDTH)

    def weft() -> Contender:
        stages = {index: make_stage(index, recompute) for index in schedule.stages_of(rank)}
        parts = [PipelineStage(module, index) for index, module in stages.items()]
        executor = PipelineExecutor(schedule, parts, mesh, nn.functional.mse_loss, timeout=120)
        return Contender(lambda: executor.step(batch, targets).timeline, blocks_of(stages), [], [])

    def torch_() -> Contender:
        stages = {index: make_stage(index, recompute) for index in schedule.stages_of(rank)}
        parts = [
            TorchStage(m, i, schedule.stages, torch.device("cpu"), group=mesh.get_group()) for i, m in stages.items()
        ]
        made = getattr(torch_schedules, PAIRS[name])(
            parts if schedule.stages > ranks else parts[0], microbatches, loss_fn=nn.functional.mse_loss
        )
        arguments = (batch,) if 0 in stages else ()
        last = {"target": targets, "losses": []} if schedule.stages - 1 in stages else {}
        return Contender(lambda: made.step(*arguments, return_outputs=False, **last), blocks_of(stages), [], [])

    return {"weft": weft(), "torch": torch_()}


def blocks_of(stages: dict[int, nn.Module]) -> list[Block]:
    return [block for stage in stages.values() for block in stage.modules() if isinstance(block, Block)]


def measure(contender: Contender) -> None:
    for block in contender.blocks:
        block.runs = 0
        block.zero_grad()
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.thread_time()
    contender.timeline = contender.step()
    contender.seconds.append(time.perf_counter() - start)
    contender.cpu_seconds.append(time.thread_time() - cpu_start)


def over_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def simulated(name: str, ranks: int, microbatches: int, timeline: Timeline) -> float:
    """The step as the simulator predicts it from the mean measured cost of each kind of action."""
    costs = []
    for kind in "FBIW":
        boxes = [box.end - box.start for box in timeline.boxes if box.action.kind == kind]
        costs.append(statistics.fmean(boxes) if boxes else 0.0)
    forward, whole, input_gradient, weight_gradient = over_ranks(costs)
    schedule = build_schedule(name, ranks, microbatches, 1 if name in ("gpipe", "1f1b") else 2)
    if not input_gradient:
        input_gradient = whole
    return simulate_schedule(schedule, ScheduleCosts(forward, input_gradient, weight_gradient)).makespan


def compare(arguments: argparse.Namespace) -> list[str]:
    """On every rank: all schedules in turn; the lines to print."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    build_mesh(pipeline=arguments.ranks)
    rows = rows_for(arguments.milliseconds)
    lines = [
        f"{arguments.ranks} ranks, {arguments.microbatches} microbatches, stages of {arguments.milliseconds:g} ms "
        f"({rows} × {WIDTH} numbers travel), recompute {'on' if arguments.recompute else 'off'}",
        f"{'schedule':<15} {'weft ms':>9} {'torch ms':>9} {'ratio':>6} {'weft CPU':>9} {'torch CPU':>9} {'runs':>5} "
        f"{'torch':>6} {'step / simulated':>17}",
    ]
    for name in arguments.schedules:
        contenders = contend(name, arguments.ranks, arguments.microbatches, rows, arguments.recompute)
        for turn in range(arguments.steps + 3):
            for contender in contenders.values():
                measure(contender)
                if turn < 3:
                    contender.seconds.clear()
                    contender.cpu_seconds.clear()
        lines.append(row_of(name, arguments, contenders))
        dist.barrier()
    return lines


def row_of(name: str, arguments: argparse.Namespace, contenders: dict[str, Contender]) -> str:
    found: dict[str, Any] = {}
    for who, contender in contenders.items():
        seconds, cpu = over_ranks([statistics.median(contender.seconds), statistics.median(contender.cpu_seconds)])
        runs = statistics.fmean(block.runs for block in contender.blocks) / arguments.microbatches
        found[who] = (seconds * 1e3, cpu * 1e3, *over_ranks([runs]))
    timeline = contenders["weft"].timeline
    assert timeline is not None
    predicted = simulated(name, arguments.ranks, arguments.microbatches, timeline) * 1e3
    (ours, our_cpu, our_runs), (theirs, their_cpu, their_runs) = found["weft"], found["torch"]
    return (
        f"{name:<15} {ours:9.2f} {theirs:9.2f} {ours / theirs:6.2f} {our_cpu:9.2f} {their_cpu:9.2f} {our_runs:5.2f} "
        f"{their_runs:6.2f} {ours / predicted:17.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=0.5, help="forward and backward of a stage")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--schedules", nargs="+", choices=PAIRS, default=list(PAIRS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=arguments.ranks, rdzv_backend="c10d", run_id="pipeline"
    )
    print("\n".join(elastic_launch(config, compare)(arguments)[0]))


if __name__ == "__main__":
    main()
