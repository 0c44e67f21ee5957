"""Boxes in time: what a simulation predicts and what a run measures, in one form."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from weft.parallel.pipeline.table import Action


class Box(NamedTuple):
    """One action of one rank from `start` to `end`, in seconds or in the unit of the simulated costs."""

    rank: int
    action: Action
    start: float
    end: float


class Timeline:
    """When the actions of some or all ranks of a pipeline start and end.

    Args:
        programs: the actions of each rank; empty for ranks that are not known.
        starts: the start of each of them.
        ends: the end of each of them.
    """

    def __init__(
        self, programs: Sequence[Sequence[Action]], starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
    ) -> None:
        self.programs = programs
        self._starts = starts
        self._ends = ends

    @property
    def ranks(self) -> int:
        return len(self.programs)

    @cached_property
    def boxes(self) -> list[Box]:
        """All boxes, rank by rank, in the order of the programs."""
        return [box for rank in range(self.ranks) for box in self.boxes_of(rank)]

    def boxes_of(self, rank: int) -> list[Box]:
        """The boxes of one rank, in the order of its program."""
        times = zip(self.programs[rank], self._starts[rank], self._ends[rank], strict=True)
        return [Box(rank, action, start, end) for action, start, end in times]

    @cached_property
    def start(self) -> float:
        return min((min(starts) for starts in self._starts if starts), default=0.0)

    @cached_property
    def end(self) -> float:
        return max((max(ends) for ends in self._ends if ends), default=0.0)

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return self.end - self.start

    @property
    def spans(self) -> list[float]:
        """Time of each rank from its own first start to its own last end; 0 without actions."""
        ranks = zip(self._starts, self._ends, strict=True)
        return [max(ends, default=0.0) - min(starts, default=0.0) for starts, ends in ranks]

    @cached_property
    def busy(self) -> list[float]:
        """Time that each rank spends on actions."""
        return [sum(ends) - sum(starts) for starts, ends in zip(self._starts, self._ends, strict=True)]

    @property
    def bubbles(self) -> list[float]:
        """The idle share of each rank's time between the first start and the last end of all."""
        return [1.0 - busy / self.makespan if self.makespan > 0.0 else 0.0 for busy in self.busy]

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time between the first start and the last end."""
        return sum(self.bubbles) / self.ranks
