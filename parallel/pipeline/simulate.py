"""Times a schedule without running it: every action starts as early as its rank and its needs allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weft.parallel.pipeline.check import describe
from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, Value, gives, needs
from weft.parallel.pipeline.timeline import Box, Timeline


@dataclass(frozen=True)
class ScheduleCosts:
    """Time of each action kind and of sending one value to another rank, in any one unit.

    A whole backward costs its input gradient and its weight gradient together. Each of the three may be one number for
    all stages or one per stage. `send` is the delay between the end of an action and its value being there for another
    rank; it overlaps with computation.
    """

    forward: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] = 1.0
    weight_gradient: float | Sequence[float] = 1.0
    send: float = 0.0

    def of_stages(self, stages: int) -> Mapping[str, Sequence[float]]:
        """Per action kind, the cost on each stage."""
        forward, input_gradient, weight_gradient = (
            _per_stage(name, getattr(self, name), stages) for name in ("forward", "input_gradient", "weight_gradient")
        )
        whole = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
        return {"F": forward, "I": input_gradient, "W": weight_gradient, "B": whole}


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
    costs = costs or ScheduleCosts()
    cost_of = costs.of_stages(schedule.stages)
    done: dict[Value, float] = {}
    boxes: list[list[Box]] = [[] for _ in schedule.programs]
    waiting: dict[Value, int] = {}
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        clock = boxes[rank][-1].end if boxes[rank] else 0.0
        for action in schedule.programs[rank][len(boxes[rank]) :]:
            start = _earliest_start(action, rank, clock, schedule, done, costs.send)
            if isinstance(start, Value):
                waiting[start] = rank
                break
            clock = start + cost_of[action.kind][action.stage]
            boxes[rank].append(Box(rank, action, start, clock))
            for value in gives(action):
                done[value] = clock
                if value in waiting:
                    ready.append(waiting.pop(value))
    for rank, program in enumerate(schedule.programs):
        if len(boxes[rank]) < len(program):
            lacking = next(v for v in needs(program[len(boxes[rank])], schedule.stages) if v not in done)
            raise ScheduleError(f"deadlock: rank {rank}: {program[len(boxes[rank])]} waits for {describe(lacking)}")
    return Timeline((box for of_rank in boxes for box in of_rank), schedule.ranks)


def _earliest_start(
    action: Action, rank: int, clock: float, schedule: Schedule, done: Mapping[Value, float], send: float
) -> float | Value:
    """When `action` can start on a rank that is free at `clock`, or the value that it still lacks."""
    start = clock
    for value in needs(action, schedule.stages):
        end = done.get(value)
        if end is None:
            return value
        start = max(start, end if schedule.placement[value.stage] == rank else end + send)
    return start
