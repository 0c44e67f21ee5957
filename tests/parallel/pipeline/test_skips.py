"""Values that pass stages by arrive where they are used, and their gradients come back, as in one process."""

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.pipeline.serial import (
    Block,
    Outcome,
    assert_equal,
    gradients,
    mean_square,
    microbatches,
    run_pipeline,
)
from tests.pool import Pool
from weft.parallel import Schedule, ScheduleCosts, ScheduleError, build_schedule, check_schedule, simulate_schedule
from weft.parallel.pipeline.stage import WithSkips

SKIPS = {"outer": (0, 3), "inner": (1, 2), "same": (0, 2)}


class Level(nn.Module):
    """A block that uses the skips that it gets, and returns those that begin at its stage."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.block = Block(index)

    def forward(self, x: Tensor, **skips: dict) -> Tensor | WithSkips:
        for skip in skips.values():
            assert skip["nothing"] is None
            x = x + torch.tanh(skip["hidden"]) * skip["mask"]
        hidden = self.block(x)
        nest = {"hidden": hidden if self.index else x, "mask": hidden > 0, "nothing": None}
        own = {name: nest for name, (source, _) in SKIPS.items() if source == self.index}
        return WithSkips(hidden, own) if own else hidden


def levels() -> list[nn.Module]:
    return [Level(index) for index in range(4)]


def steps() -> list[tuple[list[Tensor], list[Tensor]]]:
    def uneven(microbatch: int) -> int:
        return 2 + microbatch % 3

    return [
        (microbatches(5, seed=1), microbatches(5, seed=2)),
        (microbatches(5, seed=3, rows=uneven), microbatches(5, seed=4, rows=uneven)),
    ]


def run_serial_levels() -> Outcome:
    modules, losses = levels(), []
    for batch, targets in steps():
        total = 0.0
        for x, target in zip(batch, targets, strict=True):
            outputs: list = []
            for index, module in enumerate(modules):
                skips = {name: outputs[s].skips[name] for name, (s, t) in SKIPS.items() if t == index}
                outputs.append(module(x, **skips))
                x = outputs[-1].payload if isinstance(outputs[-1], WithSkips) else outputs[-1]
            loss = mean_square(x, target) / len(batch)
            loss.backward()
            total += loss.item()
        losses.append(total)
    return Outcome(losses, gradients(modules))


def run_levels(schedule: Schedule) -> Outcome:
    return run_pipeline(schedule, levels(), steps())


@pytest.mark.parametrize(
    ("name", "ranks", "per_rank"),
    [("gpipe", 4, 1), ("1f1b", 4, 1), ("zb-h1", 4, 1), ("interleaved", 2, 2), ("zb-v", 2, 2), ("looped-bfs", 1, 4)],
)
def test_equals_serial(pool: Pool, name: str, ranks: int, per_rank: int) -> None:
    """On 4 ranks all skips travel; on 2 looped or folded ones stay on their rank; on 1 all do."""
    schedule = build_schedule(name, ranks, 5, per_rank).with_skips(**SKIPS)
    check_schedule(schedule)
    assert_equal(pool.run(ranks, run_levels, schedule), run_serial_levels())


def test_a_skip_costs_its_send() -> None:
    """Forwards of 1 on three ranks; a skip from the first to the last takes longer than the way past the second."""

    def slow(source: int, destination: int) -> float:
        return 10.0 if destination - source == 2 else 0.0

    schedule = build_schedule("gpipe", 3, 1).with_skips(memory=(0, 2))
    assert simulate_schedule(schedule, ScheduleCosts(send=slow)).boxes_of(2)[0].start == 11
    assert check_schedule(schedule).messages == [2, 2, 2]


@pytest.mark.parametrize("skip", [(2, 2), (3, 1), (0, 4)])
def test_a_skip_leads_to_a_later_stage(skip: tuple[int, int]) -> None:
    with pytest.raises(ScheduleError, match=f"skip 'memory' leads from stage {skip[0]} to {skip[1]}"):
        build_schedule("gpipe", 4, 2).with_skips(memory=skip)


def run_unannounced() -> None:
    run_pipeline(build_schedule("looped-bfs", 1, 5, 4).with_skips(outer=(0, 3)), levels(), steps())


def test_what_a_stage_returns_must_agree_with_the_schedule(pool: Pool) -> None:
    with pytest.raises(
        ValueError, match=r"stage 0 returned the skips \['outer', 'same'\], but the schedule has \['outer'"
    ):
        pool.run(1, run_unannounced)
