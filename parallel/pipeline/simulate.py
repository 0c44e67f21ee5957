"""Times a schedule without running it: every action starts as early as its rank and its needs allow."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

from weft.parallel.pipeline.table import KINDS, Action, Schedule, ScheduleError, gives, needs, without_collector
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


@without_collector()
def simulate_schedule(schedule: Schedule, costs: ScheduleCosts | None = None) -> Timeline:
    """Run every program as early as its needs allow.

    Raises:
        ScheduleError: the schedule cannot run to its end; `check_schedule` says why in more detail.
    """
    return _Simulation(schedule, costs or ScheduleCosts()).run()


class _Slots(NamedTuple):
    """When one value of one stage exists, and which rank waits for it, by microbatch."""

    times: "array[float]"
    waiting: dict[int, int]


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


Need = tuple["array[float]", float, dict[int, int]]  # times of a value, how long it takes to arrive, who waits for it
Gift = tuple["array[float]", _Queue | None, dict[int, int]]  # times of a value, the queue before it, who waits for it
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
        self._slots: dict[tuple[str, int], _Slots] = {}
        self._users: dict[tuple[str, int], set[int]] = {}
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrivals: dict[tuple[str, int], dict[int, tuple[_Slots, _Queue]]] = {}
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

    def _way(self, name: str, stage: int, user: int) -> tuple[_Slots, float]:
        """Slots of a value for a rank that uses it: those of the value itself, or its arrivals through a queue."""
        holder = self._schedule.placement[stage]
        itself = self._slots.setdefault((name, stage), self._new_slots())
        link = self._costs.link_between(holder, user)
        if not link.queues or not self._costs.send_bytes / link.bandwidth:
            return itself, self._costs.send_between(holder, user)
        queue = self._queues.setdefault((holder, user), _Queue(link, self._costs.send_bytes))
        arrivals = self._arrivals.setdefault((name, stage), {})
        slots, _ = arrivals.setdefault(user, (self._new_slots(), queue))
        return slots, 0.0

    def _new_slots(self) -> _Slots:
        return _Slots(array("d", [UNKNOWN]) * self._schedule.microbatches, {})

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


class _Simulation:
    """Ranks run until they lack a value, and are woken by whoever gives it."""

    def __init__(self, schedule: Schedule, costs: ScheduleCosts) -> None:
        self._schedule = schedule
        self._duties = Duties(schedule, costs).of
        self._starts = [array("d") for _ in schedule.programs]
        self._ends = [array("d") for _ in schedule.programs]
        self._ready = list(range(schedule.ranks))

    def run(self) -> Timeline:
        ranks = [self._run_rank(rank) for rank in self._ready]
        while self._ready:
            next(ranks[self._ready.pop()], None)
        for rank, program in enumerate(self._schedule.programs):
            done = len(self._ends[rank])
            if done < len(program):
                raise ScheduleError(f"deadlock: rank {rank} waits at {program[done]} for ever")
        return Timeline(self._schedule.programs, self._starts, self._ends)

    def _run_rank(self, rank: int) -> Iterator[None]:
        """Work off the program of `rank`; gives way whenever a value is not there yet."""
        duties, wake = self._duties, self._ready.append
        start_at, end_at = self._starts[rank].append, self._ends[rank].append
        clock = held = 0.0
        for (kind, stage, microbatch), lag in self._steps(rank):
            needed, cost, given, sending = duties[kind][stage]
            for times, delay, waiting in needed:
                while (time := times[microbatch]) == UNKNOWN:
                    waiting[microbatch] = rank
                    yield
                time += delay
                if time > clock:
                    clock = time
            if lag is None:
                continue
            start_at(clock)
            clock += cost
            end_at(clock)
            there = clock + lag
            for times, queue, waiting in given:
                times[microbatch] = there if queue is None else queue.arrival(there)
                if microbatch in waiting:
                    wake(waiting.pop(microbatch))
            held += sending
            if held and not lag:
                clock += held
                held = 0.0

    def _steps(self, rank: int) -> Iterator[tuple[Action, float | None]]:
        """The actions of `rank`, each with the time from its end until it gives; None where it is only waited for.

        The first of an overlapped pair waits for what both need, and gives at the end of the second.
        """
        if not self._schedule.overlapped:
            yield from zip(self._schedule.programs[rank], repeat(0.0))
            return
        for first, *seconds in self._schedule.blocks(rank):
            for second in seconds:
                yield second, None
            yield first, sum(self._duties[kind][stage][1] for kind, stage, _ in seconds)
            for second in seconds:
                yield second, 0.0
