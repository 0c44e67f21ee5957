"""Schedules whose stages are placed in a loop: stage s on rank s modulo ranks, one or several stages per rank.

A rank alternates forwards and backwards after a warm-up. The microbatches pass the rank's stages in groups of as many
microbatches as there are ranks; when their number is no multiple of that, the tables are those of the next multiple
with the surplus microbatches left out, which keeps every order legal.
"""

from weft.parallel.pipeline.split import split_backward
from weft.parallel.pipeline.table import Action, Schedule


def interleaved(ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, §2.2): 1F1B's bubble divided by stages_per_rank."""
    return _alternating("interleaved", ranks, microbatches, stages_per_rank, slope=2 if stages_per_rank > 1 else 1)


def looped_bfs(ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
    """Breadth-first (Lamy-Poirier 2023, arXiv:2211.05953): each stage takes all microbatches before the rank's next."""
    programs = []
    for rank in range(ranks):
        stages = range(rank, ranks * stages_per_rank, ranks)
        forwards = [Action("F", stage, microbatch) for stage in stages for microbatch in range(microbatches)]
        backwards = [Action("B", stage, microbatch) for stage in reversed(stages) for microbatch in range(microbatches)]
        programs.append(forwards + backwards)
    return Schedule("looped-bfs", programs)


def zero_bubble_h1(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al. 2023, §2.2): a third of 1F1B's bubble; every rank holds up to `ranks` activations."""
    order = _alternating("zb-h1", ranks, microbatches, 1, slope=1)
    return split_backward(order, name="zb-h1", limit=ranks)


def zero_bubble_h2(ranks: int, microbatches: int) -> Schedule:
    """ZB-H2 (Qi et al. 2023, §2.2): no rank waits between its first and last action; up to 2 ranks - 1 activations.

    What remains of the bubble is that ranks begin, and end, one after the other.
    """
    order = _alternating("zb-h2", ranks, microbatches, 1, slope=2)
    return split_backward(order, name="zb-h2", limit=2 * ranks - 1)


def interleaved_zero_bubble(ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
    """Interleaved with split backward: idle for ranks - 1 of the actions, with no more activations than 1F1B."""
    order = _alternating("interleaved-zb", ranks, microbatches, stages_per_rank, slope=1)
    return split_backward(order, name="interleaved-zb", limit=stages_per_rank * ranks)


def alternate(forwards: list[Action], backwards: list[Action], *, warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return forwards[:warm_up] + [action for pair in pairs for action in pair] + backwards[steady:]


def _alternating(name: str, ranks: int, microbatches: int, stages_per_rank: int, *, slope: int) -> Schedule:
    """Alternation on every rank; each rank warms up with `slope` forwards more than the rank after it."""
    order = [
        (chunk, first + offset)
        for first in range(0, microbatches, ranks)
        for chunk in range(stages_per_rank)
        for offset in range(ranks)
    ]
    programs = []
    for rank in range(ranks):
        forwards = [Action("F", chunk * ranks + rank, microbatch) for chunk, microbatch in order]
        backwards = [
            Action("B", (stages_per_rank - 1 - chunk) * ranks + rank, microbatch) for chunk, microbatch in order
        ]
        warm_up = slope * (ranks - 1 - rank) + (stages_per_rank - 1) * ranks
        program = alternate(forwards, backwards, warm_up=warm_up)
        programs.append([action for action in program if action.microbatch < microbatches])
    return Schedule(name, programs)
