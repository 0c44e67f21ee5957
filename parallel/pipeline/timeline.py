"""Boxes in time: what a simulation predicts and what a run measures, in one form."""

from collections.abc import Iterable
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
    """The boxes of some or all ranks of a pipeline, of one step or of part of one."""

    def __init__(self, boxes: Iterable[Box], ranks: int) -> None:
        self.boxes = list(boxes)
        self.ranks = ranks

    @cached_property
    def start(self) -> float:
        return min((box.start for box in self.boxes), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max((box.end for box in self.boxes), default=0.0) - self.start

    @cached_property
    def busy(self) -> list[float]:
        """Time that each rank spends inside boxes."""
        busy = [0.0] * self.ranks
        for box in self.boxes:
            busy[box.rank] += box.end - box.start
        return busy

    @property
    def bubble(self) -> float:
        """Idle share of the ranks' time between the first start and the last end."""
        return 1.0 - sum(self.busy) / (self.makespan * self.ranks) if self.makespan > 0.0 else 0.0

    @property
    def bubbles(self) -> list[float]:
        """The idle share of each rank."""
        return [1.0 - busy / self.makespan if self.makespan > 0.0 else 0.0 for busy in self.busy]
