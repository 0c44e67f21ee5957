"""The executor against torch.distributed.pipelining: the same stages, schedules and machine, in turns.

    python benchmarks/pipeline.py                          # stages of 0.5 ms, two ranks, medians of 15 steps
    python benchmarks/pipeline.py --milliseconds 5 --block llama --recompute

Every rank is a process with one thread, over gloo. A stage is a few residual blocks, whose layers are torch's own; its
length is the time of one microbatch's forward and backward. Two lines per schedule, weft's and torch's; each figure is
that of the rank where it is largest:

    step        wall time of a step; `ratio` is the median over the turns of weft's over torch's
    CPU         time of the main thread in a step
    memory      most bytes of tensors that were alive at once in the first two steps, parameters aside
    receives    most received values that waited for their use, and had room made for them, at once
    runs        how often a block runs forward per microbatch
    simulated   the step over its simulation, from the measured costs of its actions and of a message; the median
                over the steps
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from blocks import WIDTH, Block, blocks_of, make_stage
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import schedules as torch_schedules

from weft.parallel import (
    PipelineExecutor,
    PipelineStage,
    ScheduleCosts,
    Timeline,
    build_mesh,
    build_schedule,
    simulate_schedule,
)
from weft.parallel.memory import track_memory
from weft.parallel.pipeline import run
from weft.parallel.pipeline.channels import open_channels
from weft.parallel.pipeline.table import Schedule, Value
from weft.parallel.pipeline.transport import DATA, Inbox, Pending, Transport

PAIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}
COLUMNS = ("step ms", "CPU ms", "memory kB", "receives", "runs")
WARM_UP = 3


class CountedInbox(Inbox):
    """Keeps the most values for which receives were posted and which were not taken yet, over all lanes."""

    waiting: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def _receive(self, value: Value, tensor: Tensor, tag: int) -> Pending:
        if tag == DATA:
            CountedInbox.waiting += 1
            CountedInbox.most = max(CountedInbox.most, CountedInbox.waiting)
        return super()._receive(value, tensor, tag)

    def take(self, value: Value) -> list[Tensor]:
        tensors = super().take(value)
        CountedInbox.waiting -= len(tensors)
        return tensors


@dataclass
class Contender:
    """One way to run a step, and what its steps have cost."""

    step: Callable[[], Timeline | None]
    receives: Callable[[], int]
    blocks: list[Block]
    memory: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    timelines: list[Timeline | None] = field(default_factory=list)

    def measure(self) -> None:
        for block in self.blocks:
            block.runs = 0
            block.zero_grad()
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.thread_time()
        self.timelines.append(self.step())
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.thread_time() - cpu_start)

    def figures(self, microbatches: int) -> list[float]:
        """One number per column, each of the rank where it is largest."""
        runs = statistics.fmean(block.runs for block in self.blocks) / microbatches
        step, cpu = (statistics.median(times) * 1e3 for times in (self.seconds, self.cpu_seconds))
        return over_ranks([step, cpu, self.memory / 1e3, self.receives(), runs])


@dataclass
class Case:
    """What the contenders run."""

    schedule: Schedule
    block: str
    rows: int
    recompute: bool

    def stages(self) -> dict[int, nn.Module]:
        own = self.schedule.stages_of(dist.get_rank())
        return {index: make_stage(self.block, index, recompute=self.recompute) for index in own}

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(99)
        batch, targets = torch.randn(2, self.schedule.microbatches * self.rows, *inner_shape(self.block))
        return batch, targets


def inner_shape(block: str) -> tuple[int, ...]:
    """Of one row: a Llama's is a short sequence."""
    return (16, WIDTH) if block == "llama" else (WIDTH,)


def weft_contender(case: Case) -> Contender:
    stages, (batch, targets) = case.stages(), case.batch()
    parts = [PipelineStage(module, index) for index, module in stages.items()]
    mesh = build_mesh(pipeline=case.schedule.ranks)["pipeline"]
    # torch's stages keep to the shapes of their first step
    value = torch.empty(case.rows, *inner_shape(case.block), device="meta")
    shapes = dict.fromkeys(range(case.schedule.stages - 1), value)
    executor = PipelineExecutor(case.schedule, parts, mesh, nn.functional.mse_loss, shapes=shapes, timeout=120)
    blocks = blocks_of(nn.ModuleList(stages.values()))
    return Contender(lambda: executor.step(batch, targets).timeline, lambda: CountedInbox.most, blocks)


def torch_contender(case: Case, name: str) -> Contender:
    schedule, stages, (batch, targets) = case.schedule, case.stages(), case.batch()
    parts = [TorchStage(module, index, schedule.stages, torch.device("cpu")) for index, module in stages.items()]
    made = getattr(torch_schedules, PAIRS[name])(
        parts if schedule.stages > schedule.ranks else parts[0], schedule.microbatches, loss_fn=nn.functional.mse_loss
    )
    arguments = (batch,) if 0 in stages else ()
    last = {"target": targets, "losses": []} if schedule.stages - 1 in stages else {}

    def receives() -> int:
        infos = [
            info for part in parts for kept in (part.args_recv_info, part.grad_recv_info) for info in kept.values()
        ]
        return sum(getattr(one, "buffer", None) is not None for info in infos for one in info if one is not None)

    blocks = blocks_of(nn.ModuleList(stages.values()))
    return Contender(lambda: made.step(*arguments, return_outputs=False, **last), receives, blocks)


def rows_for(block: str, milliseconds: float) -> int:
    """Rows per microbatch at which forward and backward of a stage take so long, the same on every rank."""
    stage, rows = make_stage(block, 0, recompute=False), 1
    while True:
        x = torch.randn(rows, *inner_shape(block), requires_grad=True)
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


def over_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def hop_seconds(schedule: Schedule, shape: tuple[int, ...]) -> float:
    """How long a stage's output takes to the next rank and to be seen there: half of a median turn."""
    cpu, value, turns = torch.device("cpu"), torch.zeros(shape), []
    transport = Transport(open_channels(build_mesh(pipeline=schedule.ranks)["pipeline"], cpu, 120), schedule, cpu, 120)
    rank = transport.rank
    for _ in range(30):
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                work = transport.send(value, 1 - rank, DATA, str)
                transport.wait(work, 1 - rank, str)
            elif rank < 2:
                transport.wait(transport.receive(value, 1 - rank, DATA, str), 1 - rank, str)
        turns.append(time.perf_counter() - start)
    return over_ranks([statistics.median(turns) / 2])[0]


def simulated(schedule: Schedule, timeline: Timeline, hop: float) -> float:
    """The step as the simulator predicts it from the measured costs: the mean of each kind of action on each stage, and
    of a message.
    """
    costs = torch.zeros(4, schedule.stages, dtype=torch.float64)
    for row, kind in enumerate("FBIW"):
        for stage in range(schedule.stages):
            found = [b.end - b.start for b in timeline.boxes if (b.action.kind, b.action.stage) == (kind, stage)]
            costs[row, stage] = statistics.fmean(found) if found else 0.0
    dist.all_reduce(costs, op=dist.ReduceOp.MAX)
    forward, whole, input_gradient, weight_gradient = costs
    input_gradient = torch.where(input_gradient > 0, input_gradient, whole)
    made = ScheduleCosts(forward.tolist(), input_gradient.tolist(), weight_gradient.tolist(), send=hop)
    return simulate_schedule(schedule, made).makespan


def compare(arguments: argparse.Namespace) -> list[str]:
    """On every rank: all schedules in turn; the lines to print."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    run.Inbox = CountedInbox  # type: ignore[misc]
    build_mesh(pipeline=arguments.ranks)
    rows = rows_for(arguments.block, arguments.milliseconds)
    heading = "".join(f"{column:>11}" for column in (*COLUMNS, "ratio", "simulated"))
    lines = [
        f"{arguments.ranks} ranks, {arguments.microbatches} microbatches of {rows} rows, {arguments.block} stages of "
        f"{arguments.milliseconds:g} ms, recompute {'on' if arguments.recompute else 'off'}",
        f"{'schedule':<15}{'':<6}{heading}",
    ]
    for name in arguments.schedules:
        per_rank = 1 if name in ("gpipe", "1f1b") else 2
        schedule = build_schedule(name, arguments.ranks, arguments.microbatches, per_rank)
        lines += rows_of(name, Case(schedule, arguments.block, rows, arguments.recompute), arguments.steps)
    return lines


def rows_of(name: str, case: Case, steps: int) -> list[str]:
    """Both contenders in turns, who begins alternating; a line for each."""
    CountedInbox.most = 0
    ours, theirs = weft_contender(case), torch_contender(case, name)
    for contender in (ours, theirs):
        with track_memory() as memory:
            contender.measure()
            contender.measure()
        contender.memory = memory.peak
    for turn in range(steps + WARM_UP):
        for contender in (ours, theirs) if turn % 2 else (theirs, ours):
            contender.measure()
    for contender in (ours, theirs):
        for kept in (contender.seconds, contender.cpu_seconds, contender.timelines):
            del kept[: WARM_UP + 2]
    turns = torch.tensor([ours.seconds, theirs.seconds], dtype=torch.float64)
    dist.all_reduce(turns, op=dist.ReduceOp.MAX)
    ratio = statistics.median((turns[0] / turns[1]).tolist())
    hop = hop_seconds(case.schedule, (case.rows, *inner_shape(case.block)))
    simulations = [simulated(case.schedule, timeline, hop) for timeline in ours.timelines if timeline is not None]
    predicted = statistics.median(step / own for step, own in zip(turns[0].tolist(), simulations, strict=True))
    figures: dict[str, list[Any]] = {
        who: contender.figures(case.schedule.microbatches) for who, contender in (("weft", ours), ("torch", theirs))
    }
    figures["weft"] += [ratio, predicted]
    dist.barrier()
    return [
        f"{name if who == 'weft' else '':<15}{who:<6}" + "".join(f"{number:>11,.2f}" for number in numbers)
        for who, numbers in figures.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=0.5, help="forward and backward of a stage")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--block", choices=["mlp", "llama"], default="mlp")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--schedules", nargs="+", choices=PAIRS, default=list(PAIRS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("\n".join(on_ranks(arguments.ranks, compare, arguments)[0]))


if __name__ == "__main__":
    main()
