"""Both ways to run through a table in time, action by action and all ranks at once, find the same times to the bit."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.pipeline.test_schedules import schedules
from weft.parallel import Link, Schedule, ScheduleCosts, ScheduleError, build_schedule, check_schedule, forward_only
from weft.parallel.pipeline import simulate
from weft.parallel.pipeline.costs import Send
from weft.parallel.pipeline.duties import Duties, Times
from weft.parallel.pipeline.schedules import BUILDERS
from weft.parallel.pipeline.simulate import Loop, simulate_schedule
from weft.parallel.pipeline.wavefront import Wavefront

seconds = st.floats(0.0, 3.0, width=32)
links = st.builds(Link, latency=seconds, bandwidth=st.floats(0.5, 9.0), queues=st.booleans())
SENDS: dict[str, Callable[[int, int], Send]] = {
    "number": lambda source, destination: 0.25 * source + 0.1 * destination,
    "queue": lambda source, destination: Link(0.1 * destination, 1.0 + source),
    "either": lambda source, destination: Link(0.3, 2.0, queues=source % 2 == 0) if destination % 3 else 0.2,
}


@st.composite
def tables(draw: st.DrawFn) -> Schedule:
    schedule = draw(schedules(most_ranks=6, most_microbatches=12))
    if draw(st.booleans()) and schedule.stages > 2:
        schedule = schedule.with_skips(far=(0, schedule.stages - 1), near=(0, schedule.stages // 2))
    return forward_only(schedule) if draw(st.booleans()) else schedule


@st.composite
def costs(draw: st.DrawFn, stages: int) -> ScheduleCosts:
    own = st.one_of(seconds, st.lists(seconds, min_size=stages, max_size=stages))
    send = draw(st.one_of(seconds, links, st.sampled_from(sorted(SENDS)).map(SENDS.__getitem__)))
    return ScheduleCosts(
        draw(own),
        draw(own),
        draw(own),
        send=send,
        send_bytes=draw(st.sampled_from([0.0, 1.0])),
        overlap=draw(st.booleans()),
    )


def both(schedule: Schedule, costs: ScheduleCosts) -> tuple[tuple[Times, Times], tuple[Times, Times]]:
    return Loop(schedule, Duties(schedule, costs)).run(), Wavefront(schedule, Duties(schedule, costs)).run()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_find_the_same_times(data: st.DataObject) -> None:
    schedule = data.draw(tables())
    one, other = both(schedule, data.draw(costs(schedule.stages)))
    assert one == other


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_come_as_far_in_a_table_that_cannot_end(name: str) -> None:
    schedule = build_schedule(name, 4, 6, 1 if name in ("gpipe", "1f1b", "zb-h1", "zb-h2") else 2)
    choose = random.Random(name)
    stuck = 0
    for _ in range(40):
        programs = [list(program) for program in schedule.programs]
        program = choose.choice(programs)
        first, second = choose.sample(range(len(program)), 2)
        program[first], program[second] = program[second], program[first]
        if choose.random() < 0.3:
            del program[first]
        changed = replace(schedule, programs=programs)
        one, other = both(changed, ScheduleCosts(send=0.5))
        assert one == other
        stuck += list(map(len, other[1])) != list(map(len, programs))
    assert stuck


def test_a_pair_whose_second_action_takes_next_to_nothing_still_sends_at_its_end() -> None:
    one, other = both(build_schedule("dualpipe-v", 4, 12, 2), ScheduleCosts(1.0, 1e-20, 0.0, send=0.5, overlap=False))
    assert one == other


def test_tables_of_many_ranks_are_run_all_ranks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build_schedule("1f1b", simulate.WIDE, 3, 1)
    expected = Loop(schedule, Duties(schedule, ScheduleCosts())).run()
    monkeypatch.delattr(Loop, "run")
    timeline = simulate_schedule(schedule)
    assert [[box.start for box in timeline.boxes_of(rank)] for rank in range(timeline.ranks)] == list(
        map(list, expected[0])
    )
    assert timeline.busy == pytest.approx([9.0] * schedule.ranks)
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits at 0B0 for ever"):
        simulate_schedule(replace(schedule, programs=[*schedule.programs[:-1], []]))


def test_an_action_that_stands_twice_runs_twice() -> None:
    schedule = build_schedule("1f1b", 3, 2, 1)
    doubled = replace(schedule, programs=[[schedule.programs[0][0], *schedule.programs[0]], *schedule.programs[1:]])
    with pytest.raises(ScheduleError):
        check_schedule(doubled)
    one, other = both(doubled, ScheduleCosts())
    assert [list(map(len, ends)) for _, ends in (one, other)] == [[5, 4, 4], [5, 4, 4]]
