"""Ranks that are processes on fewer cores: cores with work are never idle, and no rank is faster than its core."""

from collections.abc import Callable

import pytest

from weft.launch.plan.breakdown import StepTime
from weft.launch.plan.cores import on_shared_cores, shared_length
from weft.parallel import ScheduleCosts, build_schedule, simulate_schedule
from weft.parallel.pipeline.table import Action


def costs(forward: float, input_gradient: float, weight_gradient: float) -> Callable[[Action], float]:
    of_kind = {
        "F": forward,
        "B": input_gradient + weight_gradient,
        "I": input_gradient,
        "W": weight_gradient,
    }
    return lambda action: of_kind[action.kind]


def test_ranks_that_never_wait_take_their_share() -> None:
    time = StepTime(compute=8.0, tensor=1.0, optimizer=0.5)
    assert on_shared_cores(time, 9.0) == time


def test_waiting_of_one_rank_is_work_of_another() -> None:
    time = StepTime(compute=8.0, bubble=2.0, optimizer=0.5)
    assert on_shared_cores(time, 8.0).total == pytest.approx(8.5)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_with_a_core_for_each_rank_a_pipeline_is_as_long_as_the_simulator_says(schedule: str) -> None:
    table = build_schedule(schedule, 4, 8)
    alone = simulate_schedule(table, ScheduleCosts(1.0, 1.5, 0.75)).makespan
    assert shared_length(table, costs(1.0, 1.5, 0.75), 1.0) == pytest.approx(alone)


def test_one_core_is_never_idle() -> None:
    """Ranks are timed while all of them share it, so each takes as long as all of its actions together."""
    table = build_schedule("1f1b", 4, 8)
    assert shared_length(table, costs(1.0, 1.0, 1.0), 0.25) == pytest.approx(8 * 3.0)


def test_a_core_is_idle_while_too_few_ranks_have_work() -> None:
    """Two ranks on one and a half cores, one microbatch: a forward and a backward each, one rank after the other."""
    table = build_schedule("1f1b", 2, 1)
    assert shared_length(table, costs(3.0, 1.0, 2.0), 0.75) == pytest.approx(0.75 * (3.0 + 3.0 + 3.0 + 3.0))


def test_time_is_between_the_work_of_the_cores_and_the_bubble_of_a_core_for_each() -> None:
    table = build_schedule("1f1b", 4, 8)
    work = 8 * 3.0
    with_bubble = simulate_schedule(table, ScheduleCosts(1.0, 1.0, 1.0)).makespan
    assert work < shared_length(table, costs(1.0, 1.0, 1.0), 0.5) < with_bubble
