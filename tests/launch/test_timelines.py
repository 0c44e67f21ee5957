"""The pictures of a run's pipeline: a simulation with a timeline's own costs is that timeline again."""

import pytest

from weft.launch.timelines import measured_costs, timeline_pictures
from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.schedules import build_schedule
from weft.parallel.pipeline.simulate import simulate_schedule


@pytest.mark.parametrize(("name", "stages_per_rank"), [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_simulating_measured_costs_gives_the_measured_timeline(name: str, stages_per_rank: int) -> None:
    schedule = build_schedule(name, 4, 8, stages_per_rank)
    uneven = [1.0 + 0.25 * stage for stage in range(schedule.stages)]
    measured = simulate_schedule(schedule, ScheduleCosts(uneven, uneven, uneven))
    again = simulate_schedule(schedule, measured_costs(measured, schedule.stages))
    assert again.makespan == pytest.approx(measured.makespan)
    assert again.bubble == pytest.approx(measured.bubble)
    for caption, svg in timeline_pictures(measured, schedule).items():
        assert svg.startswith("<svg"), caption
        assert name in svg
