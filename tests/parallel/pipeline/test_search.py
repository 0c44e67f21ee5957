"""The search keeps its limits, beats every schedule by name, and its bound is a bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.parallel import (
    ScheduleCosts,
    ScheduleError,
    build_schedule,
    check_schedule,
    search_schedule,
    simulate_schedule,
)
from weft.parallel.pipeline.schedules import BUILDERS
from weft.parallel.pipeline.search import share_costs

cost = st.sampled_from([0.5, 1.0, 1.3, 2.0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), cost, cost, cost, st.sampled_from([0.0, 0.1, 1.0]))
def test_nothing_by_name_is_shorter(ranks: int, count: int, f: float, i: float, w: float, send: float) -> None:
    costs = ScheduleCosts(f, i, w, send)
    found = search_schedule(ranks, count, costs, activations=ranks, stages_per_rank=2)
    peaks = check_schedule(found.schedule).peak_activations
    assert max(peaks) <= ranks * found.stages_per_rank
    own = share_costs(costs, found.stages_per_rank)
    assert simulate_schedule(found.schedule, own).makespan == pytest.approx(found.makespan)
    assert found.makespan >= found.lower_bound * (1 - 1e-12)
    for name in BUILDERS:
        for per_rank in (1, 2):
            try:
                schedule = build_schedule(name, ranks, count, per_rank)
            except ScheduleError:
                continue
            stages = schedule.stages // ranks
            length = simulate_schedule(schedule, share_costs(costs, stages)).makespan
            assert length >= found.lower_bound * (1 - 1e-12)
            if max(check_schedule(schedule).peak_activations) <= ranks * stages:
                assert length >= found.makespan * (1 - 1e-12)


def test_equal_costs_reach_the_bound() -> None:
    found = search_schedule(4, 8)
    assert found.makespan == found.lower_bound


def test_less_memory_costs_time() -> None:
    lengths = [search_schedule(8, 16, activations=limit).makespan for limit in (5, 8, 16)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[1]
    with pytest.raises(ScheduleError, match="no schedule of 8 ranks fits into 2 activations"):
        search_schedule(8, 16, activations=2)
