"""What the actions of a schedule need, cost and give in time, spelled out for those who run through a table."""

from array import array
from typing import NamedTuple

from weft.parallel.pipeline.costs import Link, ScheduleCosts
from weft.parallel.pipeline.table import KINDS, Action, Schedule, gives, needs

UNKNOWN = float("inf")


class Slots(NamedTuple):
    """When one value of one stage exists, and which rank waits for it, by microbatch."""

    times: "array[float]"
    waiting: dict[int, int]


class Queue:
    """A link on which each send waits until the one before has left."""

    def __init__(self, link: Link, send_bytes: float) -> None:
        self.latency = link.latency
        self.busy = send_bytes / link.bandwidth
        self._free = 0.0

    def arrival(self, ready: float) -> float:
        """When a value arrives that is ready to be sent at `ready`."""
        self._free = max(self._free, ready) + self.busy
        return self._free + self.latency


Times = list["array[float]"]  # of the actions of each rank
Need = tuple["array[float]", float, dict[int, int]]  # times of a value, how long it takes to arrive, who waits for it
Gift = tuple["array[float]", Queue | None, dict[int, int]]  # times of a value, the queue before it, who waits for it
Duty = tuple[list[Need], float, list[Gift], float]  # needs, cost, gifts, and how long the sends hold the rank


class Duties:
    """What the actions of a kind on a stage need, cost and give, spelled out beforehand: `of[kind][stage]`.

    Times are kept by name, stage and microbatch: a pipeline of a thousand ranks and thousands of microbatches has tens
    of millions of values, and all microbatches of a stage wait for the same ones. Hence arrays, and plain tuples, which
    Python unpacks fastest.
    """

    def __init__(self, schedule: Schedule, costs: ScheduleCosts) -> None:
        self._schedule = schedule
        self._costs = costs
        self._slots: dict[tuple[str, int], Slots] = {}
        self._users: dict[tuple[str, int], set[int]] = {}
        self._queues: dict[tuple[int, int], Queue] = {}
        self._arrivals: dict[tuple[str, int], dict[int, tuple[Slots, Queue]]] = {}
        stages = range(schedule.stages)
        cost = costs.of_stages(schedule.stages)
        needed = {kind: [self._needed_by(kind, stage) for stage in stages] for kind in KINDS}
        self.of: dict[str, list[Duty]] = {
            kind: [
                (needed[kind][stage], cost[kind][stage], self._given_by(kind, stage), self._sending_after(kind, stage))
                for stage in stages
            ]
            for kind in KINDS
        }

    def _needed_by(self, kind: str, stage: int) -> list[Need]:
        ways = []
        for name, holder, _ in needs(Action(kind, stage, 0), self._schedule):
            self._users.setdefault((name, holder), set()).add(stage)
            (times, waiting), delay = self._way(name, holder, self._schedule.placement[stage])
            ways.append((times, delay, waiting))
        return ways

    def _way(self, name: str, stage: int, user: int) -> tuple[Slots, float]:
        """Slots of a value for a rank that uses it: those of the value itself, or its arrivals through a queue."""
        holder = self._schedule.placement[stage]
        itself = self._slots.setdefault((name, stage), self._new_slots())
        link = self._costs.link_between(holder, user)
        if not link.queues or not self._costs.send_bytes / link.bandwidth:
            return itself, self._costs.send_between(holder, user)
        queue = self._queues.setdefault((holder, user), Queue(link, self._costs.send_bytes))
        arrivals = self._arrivals.setdefault((name, stage), {})
        slots, _ = arrivals.setdefault(user, (self._new_slots(), queue))
        return slots, 0.0

    def _new_slots(self) -> Slots:
        return Slots(array("d", [UNKNOWN]) * self._schedule.microbatches, {})

    def _given_by(self, kind: str, stage: int) -> list[Gift]:
        given: list[Gift] = []
        for name, *_ in gives(Action(kind, stage, 0), self._schedule):
            if (name, stage) in self._slots:
                times, waiting = self._slots[name, stage]
                given.append((times, None, waiting))
                arrivals = self._arrivals.get((name, stage), {}).values()
                given += [(slots.times, queue, slots.waiting) for slots, queue in arrivals]
        return given

    def _sending_after(self, kind: str, stage: int) -> float:
        if self._costs.overlap:
            return 0.0
        place = self._schedule.placement
        given = [name for name, *_ in gives(Action(kind, stage, 0), self._schedule)]
        users = {(name, user) for name in given for user in self._users.get((name, stage), ())}
        return sum(self._costs.send_between(place[stage], place[user]) for _, user in users)
