"""Times a schedule without running it: every action starts as early as its rank and its needs allow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weft.parallel.pipeline.table import GIVES, NEEDS, Action, Schedule, ScheduleError, gives, needs
from weft.parallel.pipeline.timeline import Timeline

UNKNOWN = float("inf")


@dataclass(frozen=True)
class Link:
    """The way from one rank to another: a send of n bytes takes `latency + n / bandwidth`.

    Attributes:
        latency: in the unit of the other costs.
        bandwidth: bytes per unit of time.
        queues: whether a send leaves only when the one before on this link has; if not, they share nothing.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")
    queues: bool = True


Send = float | Link


@dataclass(frozen=True)
class ScheduleCosts:
    """Time of each kind of action and of sending a value to another rank, in any one unit.

    Attributes:
        forward: one number for all stages, or one per stage; so are the next two.
        input_gradient: gradient of a stage's input.
        weight_gradient: gradient of its weights. A whole backward costs this and the input gradient together.
        send: from the end of an action until its value is there for another rank, a number or a `Link`; or a function
            of source and destination rank that gives either.
        send_bytes: the size of a value, for links: of a stage's output, and as much of its gradient.
        overlap: whether a rank computes while it sends. If not, it is held for as long as the send takes.
    """

    forward: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] = 1.0
    weight_gradient: float | Sequence[float] = 1.0
    send: Send | Callable[[int, int], Send] = 0.0
    send_bytes: float = 0.0
    overlap: bool = True

    def of_stages(self, stages: int) -> Mapping[str, Sequence[float]]:
        """Per action kind, the cost on each stage."""
        forward, input_gradient, weight_gradient = (
            _per_stage(name, getattr(self, name), stages) for name in ("forward", "input_gradient", "weight_gradient")
        )
        whole = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
        return {"F": forward, "I": input_gradient, "W": weight_gradient, "B": whole}

    def link_between(self, source: int, destination: int) -> Link:
        """The way between two ranks; one that takes no time from a rank to itself."""
        if source == destination:
            return Link()
        send = self.send(source, destination) if callable(self.send) else self.send
        return send if isinstance(send, Link) else Link(latency=send)

    def send_between(self, source: int, destination: int) -> float:
        """How long a send takes that waits for no other."""
        link = self.link_between(source, destination)
        return link.latency + self.send_bytes / link.bandwidth


def _per_stage(name: str, cost: float | Sequence[float], stages: int) -> list[float]:
    costs = list(cost) if isinstance(cost, Sequence) else [cost] * stages
    if len(costs) != stages:
        raise ValueError(f"{name} has {len(costs)} costs for {stages} stages; give one number or one per stage")
    return costs


def simulate_schedule(schedule: Schedule, costs: ScheduleCosts | None = None) -> Timeline:
    """Run every program as early as its needs allow.

    Raises:
        ScheduleError: the schedule cannot run to its end; `check_schedule` says why in more detail.
    """
    return _Simulation(schedule, costs or ScheduleCosts()).run()


class _Slots:
    """When one value of one stage exists, per microbatch, and the rank that waits for it."""

    def __init__(self, microbatches: int) -> None:
        self.times = [UNKNOWN] * microbatches
        self.waiting: list[int | None] = [None] * microbatches


class _Queue:
    """A link on which each send waits until the one before has left."""

    def __init__(self, link: Link, send_bytes: float) -> None:
        self._latency = link.latency
        self._busy = send_bytes / link.bandwidth
        self._free = 0.0

    def arrival(self, ready: float) -> float:
        """When a value arrives that is ready to be sent at `ready`."""
        self._free = max(self._free, ready) + self._busy
        return self._free + self._latency


class _Simulation:
    """Ranks run until they lack a value, and are woken by whoever gives it.

    Values are kept in lists by name, stage and microbatch, and the table of needs is spelled out per stage beforehand:
    a pipeline of a thousand ranks and thousands of microbatches has tens of millions of values.
    """

    def __init__(self, schedule: Schedule, costs: ScheduleCosts) -> None:
        self._schedule = schedule
        self._costs = costs
        self._action_costs = costs.of_stages(schedule.stages)
        self._slots: dict[tuple[str, int], _Slots] = {}
        self._users: dict[tuple[str, int], set[int]] = {}
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrivals: dict[tuple[str, int], dict[int, tuple[_Slots, _Queue]]] = {}
        self._needed = {kind: [self._needed_by(kind, s) for s in range(schedule.stages)] for kind in NEEDS}
        self._given = {kind: [self._given_by(kind, s) for s in range(schedule.stages)] for kind in GIVES}
        self._sending = {kind: [self._sending_after(kind, s) for s in range(schedule.stages)] for kind in GIVES}
        self._blocks = [schedule.blocks(rank) for rank in range(schedule.ranks)]
        self._current = [next(blocks, None) for blocks in self._blocks]
        self._clocks = [0.0] * schedule.ranks
        self._starts: list[list[float]] = [[] for _ in schedule.programs]
        self._ends: list[list[float]] = [[] for _ in schedule.programs]

    def run(self) -> Timeline:
        ready = list(range(self._schedule.ranks))
        while ready:
            self._advance(ready.pop(), ready)
        for rank, block in enumerate(self._current):
            if block is not None:
                raise ScheduleError(f"deadlock: rank {rank} waits at {block[0]} for ever")
        return Timeline(self._schedule.programs, self._starts, self._ends)

    def _advance(self, rank: int, ready: list[int]) -> None:
        block = self._current[rank]
        clock = self._clocks[rank]
        starts, ends = self._starts[rank], self._ends[rank]
        while block is not None:
            start = clock
            for kind, stage, microbatch in block:
                for slots, delay in self._needed[kind][stage]:
                    time = slots.times[microbatch] + delay
                    if time > start:
                        if time == UNKNOWN:
                            slots.waiting[microbatch] = rank
                            self._current[rank], self._clocks[rank] = block, clock
                            return
                        start = time
            clock = start
            for kind, stage, _ in block:
                starts.append(clock)
                clock += self._action_costs[kind][stage]
                ends.append(clock)
            end = clock
            for kind, stage, microbatch in block:
                for slots, queue in self._given[kind][stage]:
                    slots.times[microbatch] = end if queue is None else queue.arrival(end)
                    if (waiting := slots.waiting[microbatch]) is not None:
                        ready.append(waiting)
                clock += self._sending[kind][stage]
            block = next(self._blocks[rank], None)
        self._current[rank] = None

    def _needed_by(self, kind: str, stage: int) -> list[tuple[_Slots, float]]:
        """The values that an action needs, and how long they take to arrive once they are in their slots."""
        ways = []
        for name, holder, _ in needs(Action(kind, stage, 0), self._schedule):
            self._users.setdefault((name, holder), set()).add(stage)
            ways.append(self._way(name, holder, self._schedule.placement[stage]))
        return ways

    def _way(self, name: str, stage: int, user: int) -> tuple[_Slots, float]:
        """Slots of a value for a rank that uses it: those of the value itself, or its arrivals through a queue."""
        holder = self._schedule.placement[stage]
        itself = self._slots.setdefault((name, stage), _Slots(self._schedule.microbatches))
        link = self._costs.link_between(holder, user)
        if not link.queues or not self._costs.send_bytes / link.bandwidth:
            return itself, self._costs.send_between(holder, user)
        queue = self._queues.setdefault((holder, user), _Queue(link, self._costs.send_bytes))
        arrivals = self._arrivals.setdefault((name, stage), {})
        slots, _ = arrivals.setdefault(user, (_Slots(self._schedule.microbatches), queue))
        return slots, 0.0

    def _given_by(self, kind: str, stage: int) -> list[tuple[_Slots, _Queue | None]]:
        given: list[tuple[_Slots, _Queue | None]] = []
        for name, *_ in gives(Action(kind, stage, 0), self._schedule):
            if (name, stage) in self._slots:
                given.append((self._slots[name, stage], None))
                given += self._arrivals.get((name, stage), {}).values()
        return given

    def _sending_after(self, kind: str, stage: int) -> float:
        """How long the sends after an action hold its rank."""
        if self._costs.overlap:
            return 0.0
        place = self._schedule.placement
        given = [name for name, *_ in gives(Action(kind, stage, 0), self._schedule)]
        users = {(name, user) for name in given for user in self._users.get((name, stage), ())}
        return sum(self._costs.send_between(place[stage], place[user]) for _, user in users)
