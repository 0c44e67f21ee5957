"""Splits the backwards of a schedule, and fills its bubbles with the weight gradients."""

import heapq
from collections import deque
from dataclasses import replace
from math import inf

from weft.parallel.pipeline.simulate import ScheduleCosts
from weft.parallel.pipeline.table import GIVES, Action, Schedule, ScheduleError, Value, gives, needs


def split_backward(schedule: Schedule, *, name: str, limit: int, costs: ScheduleCosts | None = None) -> Schedule:
    """Replace each B of `schedule` by I in its place and by W later, where the rank would otherwise wait.

    That is the idea of zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241): nobody waits for a weight gradient.
    The order of forwards and backwards on each rank stays as it is.

    Args:
        limit: activations that a rank may hold. A forward that would hold one more waits for a W.
        costs: by which waiting is judged; all equal by default.

    Raises:
        ScheduleError: the order needs more activations than `limit`.
    """
    return _Filling(schedule, limit, costs or ScheduleCosts()).run(name)


class _Filling:
    """Runs the ranks in time; a rank whose next action cannot start does a weight gradient instead."""

    def __init__(self, schedule: Schedule, limit: int, costs: ScheduleCosts) -> None:
        self._skips = schedule.skips
        self._schedule = replace(schedule, skips={})  # they arrive before the neighbour's value that is waited for
        self._limit = limit
        self._costs = costs
        self._action_costs = costs.of_stages(schedule.stages)
        self._orders = [
            deque(Action("I" if kind == "B" else kind, stage, microbatch) for kind, stage, microbatch in program)
            for program in schedule.programs
        ]
        self._programs: list[list[Action]] = [[] for _ in schedule.programs]
        self._postponed: list[deque[Action]] = [deque() for _ in schedule.programs]
        self._held = [0] * schedule.ranks
        self._free_at = [0.0] * schedule.ranks
        self._known_at: dict[tuple[int, Value], float] = {}
        self._events = [(0.0, rank) for rank in range(schedule.ranks)]

    def run(self, name: str) -> Schedule:
        while self._events:
            time, rank = heapq.heappop(self._events)
            if self._free_at[rank] <= time:
                action = self._choose(rank, time)
                if action is not None:
                    self._start(action, rank, time)
        for rank, order in enumerate(self._orders):
            if order:
                raise ScheduleError(
                    f"schedule {name}: rank {rank} cannot reach {order[0]} with {self._limit} activations"
                )
        return Schedule(name, self._programs, self._schedule.placement, skips=self._skips)

    def _choose(self, rank: int, time: float) -> Action | None:
        if self._orders[rank]:
            action = self._orders[rank][0]
            has_room = action.kind != "F" or self._held[rank] < self._limit
            wanted = needs(action, self._schedule)
            if has_room and all(self._known_at.get((rank, value), inf) <= time for value in wanted):
                return self._orders[rank].popleft()
        return self._postponed[rank].popleft() if self._postponed[rank] else None

    def _start(self, action: Action, rank: int, time: float) -> None:
        end = time + self._action_costs[action.kind][action.stage]
        self._programs[rank].append(action)
        self._free_at[rank] = end
        heapq.heappush(self._events, (end, rank))
        for user in {rank, *self._users(action)}:
            arrival = end + self._costs.send_between(rank, user)
            heapq.heappush(self._events, (arrival, user))
            for value in gives(action, self._schedule):
                self._known_at[user, value] = arrival
        if action.kind == "I":
            self._postponed[rank].append(action._replace(kind="W"))
        self._held[rank] += {"F": 1, "I": 0, "W": -1}[action.kind]

    def _users(self, action: Action) -> list[int]:
        """The rank that may be waiting for what `action` gives."""
        stage = action.stage + (1 if "act" in GIVES[action.kind] else -1)
        return [self._schedule.placement[stage]] if 0 <= stage < self._schedule.stages else []
