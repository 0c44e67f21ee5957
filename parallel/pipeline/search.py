"""Finds the best table for measured costs and a memory limit, and says how far from the best possible it can be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from weft.parallel.pipeline.check import peak_activations
from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.schedules import BUILDERS, build_schedule
from weft.parallel.pipeline.simulate import simulate_schedule
from weft.parallel.pipeline.split import split_backward
from weft.parallel.pipeline.table import Schedule, ScheduleError

MOST_STAGES_PER_RANK = 4


@dataclass(frozen=True)
class Found:
    """The best table of a search.

    Attributes:
        makespan: its simulated length, in the unit of the costs; of its longest rank if ranks are not joined.
        lower_bound: no table for these ranks, microbatches and costs is shorter, if they are.
        peak_activations: the most that any rank holds, in activations of a whole rank's share of the layers.
    """

    schedule: Schedule
    makespan: float
    lower_bound: float
    peak_activations: float

    @property
    def stages_per_rank(self) -> int:
        return self.schedule.stages // self.schedule.ranks


def search_schedule(
    ranks: int,
    microbatches: int,
    costs: ScheduleCosts | None = None,
    *,
    activations: float | None = None,
    stages_per_rank: int = MOST_STAGES_PER_RANK,
    joined: bool = True,
) -> Found:
    """Try every schedule, placement and split within a memory limit, and return the shortest by simulation.

    Args:
        costs: of a rank's whole share of the layers, one number each; a stage of several per rank costs its part.
        activations: how many microbatches' activations of its whole share a rank can hold; None for any number.
        stages_per_rank: try up to so many.
        joined: all ranks end a step together, as a norm of the whole gradient asks. If not, each goes on by itself (the
            post-validation of Qi et al. 2023, §4), and a table is as long as its longest rank.

    Raises:
        ScheduleError: no schedule fits into the limit.
        ValueError: a cost is given per stage.
    """
    costs = costs or ScheduleCosts()
    numbers = costs.forward, costs.input_gradient, costs.weight_gradient
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a search needs one cost for all stages of forward, input gradient and weight gradient")
    limit = float("inf") if activations is None else activations
    found = []
    for schedule, per_rank in _candidates(ranks, microbatches, costs, limit, stages_per_rank):
        peak = max(peak_activations(schedule.programs)) / per_rank
        if peak <= limit:
            timeline = simulate_schedule(schedule, share_costs(costs, per_rank))
            length = timeline.makespan if joined else max(timeline.spans)
            found.append((length, peak, per_rank, schedule))
    if not found:
        raise ScheduleError(f"no schedule of {ranks} ranks fits into {limit:g} activations; allow more")
    makespan, peak, _, schedule = min(found, key=lambda candidate: candidate[:3])
    return Found(schedule, makespan, lower_bound(ranks, microbatches, costs, stages_per_rank), peak)


def lower_bound(ranks: int, microbatches: int, costs: ScheduleCosts, stages_per_rank: int) -> float:
    """No table with up to so many stages per rank is shorter.

    A rank must do all its work, and the last one to begin has to wait until a microbatch has come through one stage of
    each other rank; and one microbatch must pass all stages forward and back.
    """
    forward, input_gradient, weight_gradient = costs.forward, costs.input_gradient, costs.weight_gradient
    assert not isinstance(forward, list | tuple)
    hop = min((costs.send_between(a, b) for a in range(ranks) for b in range(ranks) if a != b), default=0.0)
    work = microbatches * (forward + input_gradient + weight_gradient)  # type: ignore[operator]
    fill = (ranks - 1) * (forward / stages_per_rank + hop)  # type: ignore[operator]
    path = ranks * (forward + input_gradient) + 2 * (ranks - 1) * hop  # type: ignore[operator]
    return float(max(work + fill, path))


def _candidates(
    ranks: int, microbatches: int, costs: ScheduleCosts, limit: float, stages_per_rank: int
) -> Iterator[tuple[Schedule, int]]:
    """Every schedule as it is, and with its backward split by the costs within the limit."""
    for name in BUILDERS:
        for per_rank in range(1, stages_per_rank + 1):
            try:
                schedule = build_schedule(name, ranks, microbatches, per_rank)
            except ScheduleError:
                continue  # has another number of stages per rank
            if schedule.stages != ranks * per_rank:
                continue
            yield schedule, per_rank
            whole = _whole_backward(schedule)
            peak = max(peak_activations(whole.programs))
            for room in {peak, peak + per_rank, int(min(limit, 2 * peak) * per_rank)}:
                try:
                    yield (
                        split_backward(whole, name=f"{name} split", limit=room, costs=share_costs(costs, per_rank)),
                        per_rank,
                    )
                except ScheduleError:
                    continue


def _whole_backward(schedule: Schedule) -> Schedule:
    """The order of forwards and backwards alone: I becomes B, W is left out."""
    programs = [
        [action._replace(kind="B") if action.kind == "I" else action for action in program if action.kind != "W"]
        for program in schedule.programs
    ]
    return Schedule(schedule.name, programs, schedule.placement)


def share_costs(costs: ScheduleCosts, per_rank: int) -> ScheduleCosts:
    """The costs of one of `per_rank` stages."""
    forward, input_gradient, weight_gradient = costs.forward, costs.input_gradient, costs.weight_gradient
    return replace(
        costs,
        forward=forward / per_rank,  # type: ignore[operator]
        input_gradient=input_gradient / per_rank,  # type: ignore[operator]
        weight_gradient=weight_gradient / per_rank,  # type: ignore[operator]
    )
