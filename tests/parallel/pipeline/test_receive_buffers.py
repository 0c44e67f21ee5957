"""A rank holds what its table needs, and little ahead of it; counted by when the buffers' memory is freed."""

import weakref
from collections import Counter
from typing import ClassVar

import pytest
from torch import Tensor

from tests.parallel.pipeline.serial import Block, mean_square, microbatches
from tests.pool import Pool
from weft.parallel import PipelineExecutor, PipelineStage, Schedule, build_mesh, build_schedule
from weft.parallel.pipeline.table import Value
from weft.parallel.pipeline.transport import DATA, Inbox


class CountedInbox(Inbox):
    """Counts received values by name until nothing holds their memory, and those `waiting` until they are taken."""

    alive: ClassVar[Counter[str]] = Counter()
    peak: ClassVar[Counter[str]] = Counter()

    def _receive(self, value: Value, tensor: Tensor, tag: int) -> object:
        if tag == DATA:
            for name in (value.name, "waiting"):
                self.alive[name] += 1
                self.peak[name] = max(self.peak[name], self.alive[name])
            weakref.finalize(tensor.untyped_storage(), self.alive.subtract, [value.name])
        return super()._receive(value, tensor, tag)

    def take(self, value: Value) -> list[Tensor]:
        tensors = super().take(value)
        self.alive["waiting"] -= len(tensors)
        return tensors


def count_buffers(name: str, ranks: int, count: int, per_rank: int) -> tuple[dict[str, int], dict[str, int]]:
    schedule = build_schedule(name, ranks, count, per_rank)
    mesh = build_mesh(pipeline=ranks)["pipeline"]
    stages = [PipelineStage(Block(index), index) for index in schedule.stages_of(mesh.get_local_rank())]
    executor = PipelineExecutor(schedule, stages, mesh, mean_square, timeout=30)
    CountedInbox.alive.clear()
    CountedInbox.peak.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.parallel.pipeline.run.Inbox", CountedInbox)
        for seed in (1, 2):
            executor.step(microbatches(count, seed=seed), microbatches(count, seed=seed + 100))
    return dict(CountedInbox.peak), dict(CountedInbox.alive)


def peaks(pool: Pool, name: str, ranks: int, count: int, per_rank: int = 1) -> list[dict[str, int]]:
    counted = pool.run(ranks, count_buffers, name, ranks, count, per_rank)
    assert not any(left for _, alive in counted for left in alive.values()), "buffers outlive the step"
    return [peak for peak, _ in counted]


@pytest.mark.parametrize(("ranks", "count"), [(2, 6), (4, 8), (4, 2)])
def test_1f1b_has_no_more_receives_waiting_than_ranks_behind(pool: Pool, ranks: int, count: int) -> None:
    for rank, peak in enumerate(peaks(pool, "1f1b", ranks, count)):
        assert 1 <= peak["waiting"] <= min(2, ranks - rank)
        assert peak.get("act", 0) <= (min(ranks - rank + 1, count) if rank else 0)
        assert peak.get("grad", 0) <= 2


@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        ("gpipe", 1),
        ("zb-h1", 1),
        ("zb-h2", 1),
        ("interleaved", 2),
        ("interleaved-zb", 2),
        ("zb-v", 2),
        ("dualpipe-v", 2),
    ],
)
def test_one_activation_per_boundary_more_than_the_table_holds(pool: Pool, name: str, per_rank: int) -> None:
    schedule = build_schedule(name, 2, 8, per_rank)
    for rank, peak in enumerate(peaks(pool, name, 2, 8, per_rank)):
        assert peak.get("act", 0) <= held_by_the_table(schedule, rank) + 2 * per_rank - 1
        assert peak.get("grad", 0) <= 2 * per_rank
        assert peak["waiting"] <= 3 * per_rank - 1


def held_by_the_table(schedule: Schedule, rank: int) -> int:
    """The most inputs from another rank that lie between their forward and the end of their backward."""
    program = schedule.programs[rank]
    spans = []
    for stage in schedule.stages_of(rank):
        if stage and schedule.placement[stage - 1] != rank:
            for microbatch in range(schedule.microbatches):
                uses = [i for i, action in enumerate(program) if action[1:] == (stage, microbatch)]
                spans.append((min(uses), max(uses)))
    return max((sum(first <= i <= last for first, last in spans) for i in range(len(program))), default=0)
