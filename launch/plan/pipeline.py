"""Seconds from the first forward to the last backward of a pipeline, in closed form and by simulation of its table."""

from collections.abc import Callable
from dataclasses import dataclass

from weft.launch.plan.cores import shared_length
from weft.launch.plan.flight import V_SHAPED, schedule_of
from weft.launch.plan.layout import Layout
from weft.launch.plan.stages import StageTimes
from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.simulate import simulate_schedule
from weft.parallel.pipeline.table import Action
from weft.parallel.pipeline.timeline import Timeline

Send = float | Callable[[int, int], float]  # for all pairs of ranks, or of source and destination

SIMULATED_ROUNDS = 6  # microbatches that are simulated, in units of the pipeline's ranks; the rest is steady


@dataclass(frozen=True)
class PipelineTime:
    """Seconds of one step's forwards and backwards.

    Attributes:
        busy: of the rank that has most to do, without sends.
        sends: how much longer it takes than with sends that take no time.
        makespan: from the first start to the last end.
    """

    busy: float
    sends: float
    makespan: float

    @property
    def bubble(self) -> float:
        return max(0.0, self.makespan - self.busy - self.sends)


def closed_form(layout: Layout, times: StageTimes, microbatches: int) -> PipelineTime:
    """The work of the fullest rank, and the schedule's bubble by its paper, with stages as long as they are on average.

    1F1B exposes two sends per microbatch in its steady state as well as while it fills and drains; interleaved
    schedules have enough microbatches in flight to hide them there.
    """
    busy = _busy(layout, times, microbatches)
    if layout.pipeline == 1:
        return PipelineTime(busy, 0.0, busy)
    waiting = layout.pipeline - 1
    forward, inputs, weights = (
        sum(seconds) / layout.pipeline for seconds in (times.forward, times.input_gradient, times.weight_gradient)
    )
    several = layout.stages_per_rank
    bubbles = {
        "interleaved": (forward + inputs + weights) / several,
        "looped-bfs": (forward + inputs + weights) / several,
        "zb-h1": max(0.0, forward + inputs - weights),
        "zb-h2": forward,
        "interleaved-zb": forward / several,
        "zb-v": forward / 2,
        "v-half": (forward + inputs + weights) / 2,
        "dualpipe-v": (forward + inputs + weights) / 3,
    }
    bubble = waiting * bubbles.get(layout.schedule, forward + inputs + weights)
    steady = 2 * times.send * waiting / layout.pipeline * microbatches if layout.schedule in ("1f1b", "zb-h1") else 0.0
    sends = 2 * waiting * times.send + steady
    return PipelineTime(busy, sends, busy + bubble + sends)


def simulated(layout: Layout, times: StageTimes, microbatches: int, *, joined: bool = True) -> PipelineTime:
    """By the engine's own simulator of the schedule's table.

    Of more than `SIMULATED_ROUNDS` rounds of microbatches two numbers are simulated, and the time that a further round
    takes between them goes on for the rest: a schedule repeats itself in its steady state.

    `joined`: a step ends for all ranks together; else it takes as long as the rank that is longest under way.
    """
    busy = _busy(layout, times, microbatches)
    if layout.pipeline == 1:
        return PipelineTime(busy, 0.0, busy)
    whole = length(layout, times, microbatches, times.send, joined=joined)
    free = length(layout, times, microbatches, 0.0, joined=joined) if times.send else whole
    return PipelineTime(busy, max(0.0, whole - free), whole)


def timeline(layout: Layout, times: StageTimes, microbatches: int, send: Send) -> Timeline:
    """Of all ranks of the pipeline."""
    costs = ScheduleCosts(times.forward, times.input_gradient, times.weight_gradient, send=send)
    return simulate_schedule(schedule_of(layout, microbatches), costs)


def length(layout: Layout, times: StageTimes, microbatches: int, send: Send, *, joined: bool) -> float:
    """Seconds of a pipeline whose steady state goes on as it does in its first rounds."""

    def simulated_length(count: int) -> float:
        drawn = timeline(layout, times, count, send)
        return drawn.makespan if joined else max(drawn.spans)

    return _continued(layout, microbatches, simulated_length)


def length_on_cores(layout: Layout, times: StageTimes, microbatches: int, cores_per_rank: float) -> float:
    """The same of ranks that share cores, which also do what their messages take: half of it either side."""
    costs = ScheduleCosts(times.forward, times.input_gradient, times.weight_gradient).of_stages(layout.stages)

    def simulated_length(count: int) -> float:
        schedule = schedule_of(layout, count)

        def seconds(action: Action) -> float:
            kind, stage, _ = action
            others = [other for other in (stage - 1, stage + 1) if 0 <= other < layout.stages and kind != "W"]
            messages = sum(schedule.placement[other] != schedule.placement[stage] for other in others)
            return costs[kind][stage] + messages * times.send / 2

        return shared_length(schedule, seconds, cores_per_rank)

    return _continued(layout, microbatches, simulated_length)


def _continued(layout: Layout, microbatches: int, simulated_length: Callable[[int], float]) -> float:
    """The length with so many microbatches, of a pipeline that repeats itself once it is full."""
    most = SIMULATED_ROUNDS * layout.pipeline
    if microbatches <= most or layout.schedule in ("gpipe", "looped-bfs"):
        return simulated_length(microbatches)
    rest = (microbatches - most) % layout.pipeline
    end = most - layout.pipeline + rest
    begin = end - 2 * layout.pipeline
    later, sooner = simulated_length(end), simulated_length(begin)
    return later + (microbatches - end) * (later - sooner) / (end - begin)


def _busy(layout: Layout, times: StageTimes, microbatches: int) -> float:
    """Seconds that the fullest rank computes."""
    whole = [sum(kinds) for kinds in zip(times.forward, times.input_gradient, times.weight_gradient, strict=True)]
    size = layout.pipeline
    if layout.schedule in V_SHAPED and layout.stages_per_rank == 2:
        ranks = [whole[rank] + whole[-1 - rank] for rank in range(size)]
    else:
        ranks = [sum(whole[rank::size]) for rank in range(size)]
    return microbatches * max(ranks)
