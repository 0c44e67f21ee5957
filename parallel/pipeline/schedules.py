"""The schedules by name. Each is a pure function of sizes that fills a table; nothing else knows how it was filled."""

from collections.abc import Callable
from difflib import get_close_matches

from weft.parallel.pipeline.table import Action, Schedule, ScheduleError


def build_schedule(name: str, ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """Fill the table of the schedule called `name`.

    Args:
        ranks: size of the pipeline axis.
        microbatches: microbatches per step; any number of at least 1.
        stages_per_rank: pieces of the model on each rank. `gpipe` and `1f1b` have one.

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


def gpipe(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965). Holds every microbatch's activations."""
    _one_stage_per_rank("gpipe", stages_per_rank)
    return Schedule(
        "gpipe",
        [_actions("F", rank, microbatches) + _actions("B", rank, microbatches) for rank in range(ranks)],
    )


def one_forward_one_backward(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """1F1B (Narayanan et al. 2019, PipeDream-Flush): gpipe's bubble with at most `ranks - rank` activations held."""
    _one_stage_per_rank("1f1b", stages_per_rank)
    programs = []
    for rank in range(ranks):
        forwards, backwards = _actions("F", rank, microbatches), _actions("B", rank, microbatches)
        programs.append(alternate(forwards, backwards, warm_up=ranks - 1 - rank))
    return Schedule("1f1b", programs)


def alternate(forwards: list[Action], backwards: list[Action], *, warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return forwards[:warm_up] + [action for pair in pairs for action in pair] + backwards[steady:]


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of `schedule` alone, in the same order and placement: what evaluation runs."""
    programs = [[action for action in program if action.kind == "F"] for program in schedule.programs]
    return Schedule(schedule.name, programs, schedule.placement)


def _actions(kind: str, stage: int, microbatches: int) -> list[Action]:
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def _one_stage_per_rank(name: str, stages_per_rank: int) -> None:
    if stages_per_rank != 1:
        raise ScheduleError(f"schedule {name} has one stage per rank, not {stages_per_rank}; choose interleaved")


BUILDERS: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
}
