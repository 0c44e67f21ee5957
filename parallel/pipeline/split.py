"""Splits the backwards of a schedule, and fills its bubbles with the weight gradients."""

import heapq
from collections import deque

from weft.parallel.pipeline.table import GIVES, Action, Schedule, ScheduleError, Value, gives, needs


def split_backward(schedule: Schedule, *, name: str, limit: int) -> Schedule:
    """Replace each B of `schedule` by I in its place and by W later, where the rank would otherwise wait.

    That is the idea of zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241): nobody waits for a weight gradient.
    The order of forwards and backwards on each rank stays as it is. Waiting is judged with equal costs of F, I and W.

    Args:
        limit: activations that a rank may hold. A forward that would hold one more waits for a W.

    Raises:
        ScheduleError: the order needs more activations than `limit`.
    """
    return _Filling(schedule, limit).run(name)


class _Filling:
    """Runs the ranks in step with unit costs; a rank whose next action cannot start does a weight gradient instead."""

    def __init__(self, schedule: Schedule, limit: int) -> None:
        self._schedule = schedule
        self._limit = limit
        self._orders = [
            deque(Action("I" if kind == "B" else kind, stage, microbatch) for kind, stage, microbatch in program)
            for program in schedule.programs
        ]
        self._programs: list[list[Action]] = [[] for _ in schedule.programs]
        self._postponed: list[deque[Action]] = [deque() for _ in schedule.programs]
        self._held = [0] * schedule.ranks
        self._free_at = [0] * schedule.ranks
        self._known_at: dict[Value, int] = {}

    def run(self, name: str) -> Schedule:
        events = [(0, rank) for rank in range(self._schedule.ranks)]
        while events:
            time, rank = heapq.heappop(events)
            if self._free_at[rank] > time:
                continue
            action = self._choose(rank, time)
            if action is not None:
                self._start(action, rank, time)
                for woken in {rank, *self._users(action)}:
                    heapq.heappush(events, (time + 1, woken))
        for rank, order in enumerate(self._orders):
            if order:
                raise ScheduleError(
                    f"schedule {name}: rank {rank} cannot reach {order[0]} with {self._limit} activations"
                )
        return Schedule(name, self._programs, self._schedule.placement)

    def _choose(self, rank: int, time: int) -> Action | None:
        if self._orders[rank]:
            action = self._orders[rank][0]
            has_room = action.kind != "F" or self._held[rank] < self._limit
            if has_room and all(self._is_known(value, time) for value in needs(action, self._schedule.stages)):
                return self._orders[rank].popleft()
        return self._postponed[rank].popleft() if self._postponed[rank] else None

    def _is_known(self, value: Value, time: int) -> bool:
        return value in self._known_at and self._known_at[value] <= time

    def _start(self, action: Action, rank: int, time: int) -> None:
        self._programs[rank].append(action)
        self._free_at[rank] = time + 1
        for value in gives(action):
            self._known_at[value] = time + 1
        if action.kind == "I":
            self._postponed[rank].append(action._replace(kind="W"))
        self._held[rank] += {"F": 1, "I": 0, "W": -1}[action.kind]

    def _users(self, action: Action) -> list[int]:
        """The ranks that may be waiting for what `action` gives."""
        stage = action.stage + (1 if "act" in GIVES[action.kind] else -1)
        return [self._schedule.placement[stage]] if 0 <= stage < self._schedule.stages else []
