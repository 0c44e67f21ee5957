"""Every schedule through the executor, with layers whose weight gradients can wait and with layers whose cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parallel.pipeline.serial import (
    WIDTH,
    Block,
    Outcome,
    assert_equal,
    gradients,
    mean_square,
    microbatches,
    run_serial,
)
from tests.pool import Pool
from weft.parallel import (
    ColumnParallelLinear,
    PipelineExecutor,
    PipelineStage,
    RowParallelLinear,
    build_mesh,
    build_schedule,
)
from weft.parallel.pipeline.schedules import BUILDERS


class ParallelBlock(nn.Module):
    """The block of `serial`, its two products made by weft's layers on a tensor axis of one."""

    def __init__(self, plain: Block, mesh: torch.distributed.device_mesh.DeviceMesh, *, recompute: bool) -> None:
        super().__init__()
        self.inner = ColumnParallelLinear(WIDTH, 2 * WIDTH, mesh=mesh, dtype=torch.float64)
        self.outer = RowParallelLinear(2 * WIDTH, WIDTH, mesh=mesh, dtype=torch.float64)
        self.load_state_dict({name: value for name, value in plain.state_dict().items() if name != "calls"})
        self.recompute = recompute
        self.runs = 0

    def _block(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.outer(torch.tanh(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._block, x, use_reentrant=False) if self.recompute else self._block(x)


class Uncovered(nn.Module):
    """The same block without a module whose weight gradients can wait."""

    def __init__(self, plain: Block) -> None:
        super().__init__()
        for name, parameter in plain.named_parameters():
            self.register_parameter(name.replace(".", "__"), parameter)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.inner__weight, self.inner__bias)
        return x + F.linear(torch.tanh(inner), self.outer__weight, self.outer__bias)


def step_of(count: int) -> tuple[list[Tensor], list[Tensor]]:
    return microbatches(count, seed=1), microbatches(count, seed=2)


def split_step(name: str, ranks: int, count: int, layers: str) -> tuple[Outcome, list[int]]:
    mesh = build_mesh(pipeline=ranks)
    schedule = build_schedule(name, ranks, count, 1)
    modules: list[nn.Module] = [Block(seed) for seed in range(schedule.stages)]
    mine = schedule.stages_of(mesh["pipeline"].get_local_rank())
    if layers == "uncovered":
        modules = [Uncovered(module) for module in modules]
    elif layers != "plain":
        for index in mine:
            modules[index] = ParallelBlock(modules[index], mesh["tensor"], recompute=layers == "recomputed")
    called: list[int] = []
    executor = PipelineExecutor(
        schedule,
        [PipelineStage(modules[index], index) for index in mine],
        mesh["pipeline"],
        mean_square,
        timeout=30,
        before_last_backward=called.append,
    )
    losses = [executor.step(*step_of(count)).loss.item() for _ in range(2)]
    assert sorted(called) == sorted(mine * 2)
    kept = {
        key.replace("__", "."): value for key, value in gradients(modules).items() if int(key.split(".")[0]) in mine
    }
    return Outcome(losses, kept), [getattr(modules[index], "runs", 0) for index in mine]


@pytest.mark.parametrize("layers", ["plain", "uncovered", "deferring", "recomputed"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_equals_serial(pool: Pool, name: str, layers: str) -> None:
    ranks, count = (4, 6) if layers == "deferring" else (2, 3)
    serial = run_serial([Block(seed) for seed in range(build_schedule(name, ranks, 1).stages)], [step_of(count)] * 2)
    results = pool.run(ranks, split_step, name, ranks, count, layers)
    assert_equal([outcome for outcome, _ in results], serial)
    if layers == "recomputed":
        assert {run for _, runs in results for run in runs} == {2 * 2 * count}  # twice per microbatch, in two steps
