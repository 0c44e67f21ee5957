"""Schedules whose stages are placed in a V: rank r holds stage r on the way down and 2 ranks - 1 - r on the way up.

The last stage then lies beside the first, a microbatch turns round without a message, and every rank holds activations
for equally long.
"""

from collections import deque
from itertools import pairwise

from weft.parallel.pipeline.split import split_backward
from weft.parallel.pipeline.table import Action, Schedule

PERIOD = 6  # forward, input gradient and weight gradient of two stages


def zero_bubble_v(ranks: int, microbatches: int) -> Schedule:
    """ZB-V (Qi et al. 2023, §6): idle for ranks - 1 of the actions, with as many activations as 1F1B's first rank."""
    order = _repeated_block(ranks, microbatches, steps=(1, 5, 1, 5), turns=(1, 1, 1))
    return split_backward(order, name="zb-v", limit=2 * ranks)


def v_half(ranks: int, microbatches: int) -> Schedule:
    """V-Half (Qi et al. 2024, arXiv:2405.15362): about half the bubble of 1F1B with half its activations."""
    turns = (1, 1, 2) if ranks % 2 else (4, 2, 4)
    order = _repeated_block(ranks, microbatches, steps=(1, 2, 1, 2), turns=turns)
    return split_backward(order, name="v-half", limit=(ranks + 2) // 2 * 2)


def _repeated_block(
    ranks: int, microbatches: int, *, steps: tuple[int, int, int, int], turns: tuple[int, int, int]
) -> Schedule:
    """Repeat the path of one microbatch every `PERIOD` time units, and keep the order in which its actions fall.

    Args:
        steps: time from rank to rank of the forwards down and up and of the backwards down and up.
        turns: time between the last action of each of these four legs and the first of the next.
    """
    down, up = list(range(ranks)), list(reversed(range(ranks)))
    legs: list[list[tuple[int, int, str, int]]] = [[] for _ in range(ranks)]
    time = 0
    for leg, kind, path in zip(range(4), "FFBB", (down, up, down, up), strict=True):
        for rank in path:
            stage = rank if leg in (0, 3) else 2 * ranks - 1 - rank
            legs[rank].append((time % PERIOD, time // PERIOD, kind, stage))
            time += steps[leg]
        if leg < 3:
            time += turns[leg] - steps[leg]
    return Schedule("block", [_in_periods(sorted(of_rank, key=lambda leg: leg[0]), microbatches) for of_rank in legs])


def _in_periods(legs: list[tuple[int, int, str, int]], microbatches: int) -> list[Action]:
    """The actions of a rank in the order in which they fall; each leg has an action per period from its first one on.

    Args:
        legs: time within the period, first period, kind and stage, in the order of time.
    """
    first = min(period for _, period, _, _ in legs)
    last = max(period for _, period, _, _ in legs) + microbatches
    return [
        Action(kind, stage, period - begin)
        for period in range(first, last)
        for _, begin, kind, stage in legs
        if 0 <= period - begin < microbatches
    ]


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipeV (DeepSeek-AI 2025, after arXiv:2412.19437, §3.2.1): forwards interleaved with whole backwards.

    The pattern is that of at least 2 ranks microbatches; a smaller number leaves out the surplus.
    """
    overlapped: set[Action] = set()
    programs = [_DualProgram(ranks, rank, max(microbatches, 2 * ranks), overlapped).fill() for rank in range(ranks)]
    kept = [[action for action in program if action.microbatch < microbatches] for program in programs]
    pairs = frozenset(
        first for program in kept for first, second in pairwise(program) if first in overlapped and second.kind == "B"
    )
    return Schedule("dualpipe-v", kept, overlapped=pairs)


class _DualProgram:
    """The eight phases of DualPipeV on one rank."""

    def __init__(self, ranks: int, rank: int, microbatches: int, overlapped: set[Action]) -> None:
        self._below = ranks - 1 - rank
        self._above = rank
        self._steady = microbatches - 2 * ranks + rank + 1
        self._stages = rank, 2 * ranks - 1 - rank
        self._counts = {(kind, leg): 0 for kind in "FB" for leg in (0, 1)}
        self._program: list[Action] = []
        self._postponed: deque[Action] = deque()
        self._overlapped = overlapped

    def fill(self) -> list[Action]:
        self._warm_up()
        for step in range(self._steady):
            self._pair(0, 1, overlapped=step > 0 or self._below > 0)
            self._pair(1, 0)
        for _ in range(self._below):
            self._backward(1)
            self._pair(1, 0)
        self._cool_down()
        return self._program

    def _warm_up(self) -> None:
        for _ in range(2 * self._below):
            self._forward(0)
        for _ in range(self._above + 1):
            self._forward(0)
            self._forward(1)
        for _ in range(self._below):
            self._backward(1, split=True)
            self._weight()
            self._forward(1)

    def _cool_down(self) -> None:
        """The backwards that are left, split from the middle on, so that weight gradients fill the end."""
        last = 2 * (self._above + 1)
        for index in range(last):
            self._backward(1 - index % 2, split=index >= last // 2)
        for _ in range(self._below):
            self._weight()
            self._backward(0, split=True)
        while self._postponed:
            self._weight()

    def _forward(self, leg: int) -> Action:
        action = Action("F", self._stages[leg], self._counts["F", leg])
        self._counts["F", leg] += 1
        self._program.append(action)
        return action

    def _backward(self, leg: int, *, split: bool = False) -> None:
        action = Action("I" if split else "B", self._stages[leg], self._counts["B", leg])
        self._counts["B", leg] += 1
        self._program.append(action)
        if split:
            self._postponed.append(action._replace(kind="W"))

    def _weight(self) -> None:
        self._program.append(self._postponed.popleft())

    def _pair(self, forward_leg: int, backward_leg: int, *, overlapped: bool = True) -> None:
        forward = self._forward(forward_leg)
        self._backward(backward_leg)
        if overlapped:
            self._overlapped.add(forward)
