"""Times a schedule without running it: every action starts as early as its rank and its needs allow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weft.parallel.pipeline.table import GIVES, NEEDS, Action, Schedule, ScheduleError, Value, describe
from weft.parallel.pipeline.timeline import Timeline

UNKNOWN = float("inf")


@dataclass(frozen=True)
class ScheduleCosts:
    """Time of each kind of action and of sending a value to another rank, in any one unit.

    Attributes:
        forward: one number for all stages, or one per stage; so are the next two.
        input_gradient: gradient of a stage's input.
        weight_gradient: gradient of its weights. A whole backward costs this and the input gradient together.
        send: from the end of an action until its value is there for another rank; or a function of source and
            destination rank.
        overlap: whether a rank computes while it sends. If not, it is held for as long as the send takes.
    """

    forward: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] = 1.0
    weight_gradient: float | Sequence[float] = 1.0
    send: float | Callable[[int, int], float] = 0.0
    overlap: bool = True

    def of_stages(self, stages: int) -> Mapping[str, Sequence[float]]:
        """Per action kind, the cost on each stage."""
        forward, input_gradient, weight_gradient = (
            _per_stage(name, getattr(self, name), stages) for name in ("forward", "input_gradient", "weight_gradient")
        )
        whole = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
        return {"F": forward, "I": input_gradient, "W": weight_gradient, "B": whole}

    def send_between(self, source: int, destination: int) -> float:
        if source == destination:
            return 0.0
        return self.send(source, destination) if callable(self.send) else self.send


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


class _Simulation:
    """Ranks run until they lack a value, and are woken by whoever gives it."""

    def __init__(self, schedule: Schedule, costs: ScheduleCosts) -> None:
        self._schedule = schedule
        self._costs = costs.of_stages(schedule.stages)
        self._blocks = [schedule.blocks(rank) for rank in range(schedule.ranks)]
        self._starts: list[list[float]] = [[] for _ in schedule.programs]
        self._ends: list[list[float]] = [[] for _ in schedule.programs]
        self._next = [0] * schedule.ranks
        self._clocks = [0.0] * schedule.ranks
        self._waiting: dict[tuple[str, int, int], int] = {}
        count = schedule.microbatches
        # When each value exists; a ring of one stage more, so that index -1 and index `stages` are always there.
        self._known = {name: [[UNKNOWN] * count for _ in schedule.placement] for name in ("act", "grad", "wgrad")}
        for name in self._known:
            self._known[name].append([0.0] * count)
        self._delays = self._needed_delays(costs)
        self._held = self._held_by_sends(costs)

    def run(self) -> Timeline:
        ready = list(range(self._schedule.ranks))
        while ready:
            self._advance(ready.pop(), ready)
        for rank, blocks in enumerate(self._blocks):
            if self._next[rank] < len(blocks):
                action, value = self._lacking(blocks[self._next[rank]])
                raise ScheduleError(f"deadlock: rank {rank}: {action} waits for {describe(value)}")
        return Timeline(self._schedule.programs, self._starts, self._ends)

    def _advance(self, rank: int, ready: list[int]) -> None:
        blocks, starts, ends, known = self._blocks[rank], self._starts[rank], self._ends[rank], self._known
        clock = self._clocks[rank]
        for block in blocks[self._next[rank] :]:
            start = clock
            for kind, stage, microbatch in block:
                for name, distance, delay in self._delays[kind][stage]:
                    time = known[name][stage + distance][microbatch] + delay
                    if time > start:
                        start = time
            if start == UNKNOWN:
                _, value = self._lacking(block)
                self._waiting[value] = rank
                break
            clock = start
            for kind, stage, _ in block:
                starts.append(clock)
                clock += self._costs[kind][stage]
                ends.append(clock)
            for kind, stage, microbatch in block:
                for name in GIVES[kind]:
                    known[name][stage][microbatch] = clock
                    if self._waiting and (name, stage, microbatch) in self._waiting:
                        ready.append(self._waiting.pop((name, stage, microbatch)))
            for kind, stage, _ in block:
                clock += self._held[kind][stage]
            self._next[rank] += 1
        self._clocks[rank] = clock

    def _needed_delays(self, costs: ScheduleCosts) -> dict[str, list[list[tuple[str, int, float]]]]:
        """Per kind and stage: the values needed, by name and distance, and how long they take to arrive."""
        place = self._schedule.placement
        return {
            kind: [
                [
                    (name, distance, costs.send_between(place[stage + distance], rank))
                    for name, distance in needed
                    if 0 <= stage + distance < len(place)
                ]
                for stage, rank in enumerate(place)
            ]
            for kind, needed in NEEDS.items()
        }

    def _held_by_sends(self, costs: ScheduleCosts) -> dict[str, list[float]]:
        """Per kind and stage: how long the sends after it hold the rank."""
        held = {kind: [0.0] * self._schedule.stages for kind in GIVES}
        if costs.overlap:
            return held
        for kind, names in GIVES.items():
            for user in ("F", "B"):
                for name, distance in NEEDS[user]:
                    if name in names and distance:
                        for stage, rank in enumerate(self._schedule.placement):
                            if 0 <= stage - distance < self._schedule.stages:
                                held[kind][stage] += costs.send_between(
                                    rank, self._schedule.placement[stage - distance]
                                )
        return held

    def _lacking(self, block: tuple[Action, ...]) -> tuple[Action, Value]:
        return next(
            (action, Value(name, action.stage + distance, action.microbatch))
            for action in block
            for name, distance, _ in self._delays[action.kind][action.stage]
            if self._known[name][action.stage + distance][action.microbatch] == UNKNOWN
        )
