"""The schedules by name. Each is a pure function of sizes that fills a table; nothing else knows how it was filled."""

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

from weft.parallel.pipeline.looped import (
    interleaved,
    interleaved_zero_bubble,
    looped_bfs,
    zero_bubble_h1,
    zero_bubble_h2,
)
from weft.parallel.pipeline.table import Schedule, ScheduleError, without_collector
from weft.parallel.pipeline.vee import dualpipe_v, v_half, zero_bubble_v


@without_collector()
def build_schedule(name: str, ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """Fill the table of the schedule called `name`.

    Args:
        ranks: size of the pipeline axis.
        microbatches: microbatches per step; any number of at least 1.
        stages_per_rank: pieces of the model on each rank. `gpipe`, `1f1b`, `zb-h1` and `zb-h2` have one, the V-shaped
            `zb-v`, `v-half` and `dualpipe-v` have two (1, the default, is taken for 2), the others any number.

    Raises:
        ScheduleError: an unknown name, or sizes that the schedule does not have.
    """
    fill = BUILDERS.get(name)
    if fill is None:
        close = get_close_matches(name, BUILDERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(BUILDERS)}"
        raise ScheduleError(f"there is no schedule named {name!r}; {hint}")
    for what, size in (("ranks", ranks), ("microbatches", microbatches), ("stages_per_rank", stages_per_rank)):
        if size < 1:
            raise ScheduleError(f"schedule {name}: {what} is {size}; choose a whole number of at least 1")
    return fill(ranks, microbatches, stages_per_rank)


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965). Holds every microbatch's activations."""
    return replace(looped_bfs(ranks, microbatches, 1), name="gpipe")


def one_forward_one_backward(ranks: int, microbatches: int) -> Schedule:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): gpipe's bubble with at most `ranks - rank` activations held."""
    return replace(interleaved(ranks, microbatches, 1), name="1f1b")


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of `schedule` alone, in the same order and placement: what evaluation runs."""
    programs = [[action for action in program if action.kind == "F"] for program in schedule.programs]
    return Schedule(schedule.name, programs, schedule.placement, skips=schedule.skips)


Builder = Callable[[int, int, int], Schedule]


def _one_stage(name: str, fill: Callable[[int, int], Schedule], instead: str) -> Builder:
    def build(ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
        if stages_per_rank != 1:
            raise ScheduleError(f"schedule {name} has one stage per rank, not {stages_per_rank}; choose {instead}")
        return fill(ranks, microbatches)

    return build


def _two_stages(name: str, fill: Callable[[int, int], Schedule]) -> Builder:
    def build(ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
        if stages_per_rank > 2:
            raise ScheduleError(
                f"schedule {name} has two stages per rank, not {stages_per_rank}; choose interleaved-zb"
            )
        return fill(ranks, microbatches)

    return build


BUILDERS: dict[str, Builder] = {
    "gpipe": _one_stage("gpipe", gpipe, "looped-bfs"),
    "1f1b": _one_stage("1f1b", one_forward_one_backward, "interleaved"),
    "interleaved": interleaved,
    "looped-bfs": looped_bfs,
    "zb-h1": _one_stage("zb-h1", zero_bubble_h1, "interleaved-zb"),
    "zb-h2": _one_stage("zb-h2", zero_bubble_h2, "interleaved-zb"),
    "interleaved-zb": interleaved_zero_bubble,
    "zb-v": _two_stages("zb-v", zero_bubble_v),
    "v-half": _two_stages("v-half", v_half),
    "dualpipe-v": _two_stages("dualpipe-v", dualpipe_v),
}
