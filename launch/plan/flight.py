"""Microbatches whose activations a rank holds at once: read off a schedule's table, or by its closed form."""

from collections.abc import Sequence
from functools import lru_cache

from weft.launch.plan.layout import Layout
from weft.launch.plan.shape import ModelShape
from weft.parallel.pipeline.schedules import build_schedule
from weft.parallel.pipeline.table import Action, Schedule

V_SHAPED = ("zb-v", "v-half", "dualpipe-v")


def stages_of_rank(layout: Layout, rank: int) -> list[int]:
    """The stages of a pipeline rank: in a loop, or in a V."""
    size = layout.pipeline
    if layout.schedule in V_SHAPED and layout.stages_per_rank == 2:
        return [rank, 2 * size - 1 - rank]
    return list(range(rank, layout.stages, size))


def distinct_ranks(shape: ModelShape, layout: Layout) -> tuple[int, ...]:
    """One pipeline rank, the first, of all that hold as many layers and the same ends of the model."""
    in_v = layout.schedule in V_SHAPED and layout.stages_per_rank == 2
    return _distinct(layout.layers(shape), layout.pipeline, in_v)


@lru_cache(maxsize=4096)
def _distinct(shares: tuple[int, ...], ranks: int, in_v: bool) -> tuple[int, ...]:
    seen: dict[tuple[int, ...], int] = {}
    last = len(shares) - 1
    for rank in range(ranks):
        stages = [rank, last - rank] if in_v else range(rank, len(shares), ranks)
        seen.setdefault((*(shares[stage] for stage in stages), 0 in stages, last in stages), rank)
    return tuple(seen.values())


def schedule_of(layout: Layout, microbatches: int) -> Schedule:
    """The table of the layout for so many microbatches.

    Raises:
        ScheduleError: the schedule does not have these sizes.
    """
    return _built(layout.schedule, layout.pipeline, microbatches, layout.stages_per_rank)


@lru_cache(maxsize=64)
def _built(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
    return build_schedule(name, ranks, microbatches, stages_per_rank)


def peak_bytes(program: Sequence[Action], size_of_stage: dict[int, float]) -> float:
    """The most bytes held at once by a rank: a forward adds its stage's, its B or W gives them back."""
    held = peak = 0.0
    sign = {"F": 1.0, "B": -1.0, "I": 0.0, "W": -1.0}
    for kind, stage, _ in program:
        held += sign[kind] * size_of_stage[stage]
        peak = max(peak, held)
    return peak


def enough_microbatches(layout: Layout, microbatches: int) -> int:
    """As many as the steady state of a schedule needs to be reached; more do not change what is in flight."""
    return microbatches if layout.schedule in ("gpipe", "looped-bfs") else min(microbatches, 4 * layout.pipeline)


def most_in_flight(layout: Layout, microbatches: int, rank: int) -> int:
    """Stage inputs that `rank` holds at once, by the closed form of the schedule; no table holds more."""
    size, several, below = layout.pipeline, layout.stages_per_rank, layout.pipeline - 1 - rank
    if size == 1:
        return several
    whole = microbatches * several
    by_schedule = {
        "1f1b": below + 1,
        "interleaved": (several - 1) * size + 2 * below + 1,
        "zb-h1": size,
        "zb-h2": 2 * size - 1,
        "interleaved-zb": several * size,
        "zb-v": 2 * size,
        "v-half": (size + 2) // 2 * 2,
        "dualpipe-v": 2 * size + 1,
    }
    if layout.schedule == "interleaved" and several == 1:
        return min(whole, below + 1)
    return min(whole, by_schedule.get(layout.schedule, whole))
