"""Every schedule, at every size: proved, and at its published bubble and memory."""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.parallel import (
    Action,
    Link,
    Schedule,
    ScheduleCosts,
    ScheduleError,
    build_schedule,
    check_schedule,
    forward_only,
    simulate_schedule,
)
from weft.parallel.pipeline.plan import plan_rank
from weft.parallel.pipeline.schedules import BUILDERS
from weft.parallel.pipeline.table import traffic

ONE_STAGE = ("gpipe", "1f1b", "zb-h1", "zb-h2")
TWO_STAGES = ("zb-v", "v-half", "dualpipe-v")
LOOPED = ("interleaved", "looped-bfs", "interleaved-zb")


@st.composite
def schedules(draw: st.DrawFn, most_ranks: int = 16, most_microbatches: int = 64) -> Schedule:
    name = draw(st.sampled_from(sorted(BUILDERS)))
    per_rank = 1 if name in ONE_STAGE else 2 if name in TWO_STAGES else draw(st.integers(1, 4))
    ranks = draw(st.integers(1, most_ranks))
    microbatches = draw(st.integers(1, most_microbatches))
    return build_schedule(name, ranks, microbatches, per_rank)


def test_every_schedule_is_tried() -> None:
    assert set(BUILDERS) == {*ONE_STAGE, *TWO_STAGES, *LOOPED}


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_is_proved_and_runs(schedule: Schedule) -> None:
    facts = check_schedule(schedule)
    assert len(facts.peak_activations) == schedule.ranks
    per_rank = schedule.stages // schedule.ranks
    timeline = simulate_schedule(schedule)
    assert timeline.busy == pytest.approx([3.0 * per_rank * schedule.microbatches] * schedule.ranks)
    check_schedule(forward_only(schedule))


@settings(max_examples=60, deadline=None)
@given(schedules(most_ranks=8, most_microbatches=20), st.booleans())
def test_plans_run_with_sends_that_are_buffered_nowhere(schedule: Schedule, skips: bool) -> None:
    """Per direction between two ranks, the k-th transfer happens once the k-th send and the k-th receive are there."""
    if skips and schedule.stages > 2:
        schedule = schedule.with_skips(far=(0, schedule.stages - 1), near=(0, schedule.stages // 2))
    lanes = traffic(schedule)
    plans = [plan_rank(schedule, rank, lanes) for rank in range(schedule.ranks)]
    place = {(lane, transfer.value): k for lane, transfers in lanes.items() for k, transfer in enumerate(transfers)}
    sent: Counter[tuple[int, int]] = Counter()
    posted = Counter({(peer, rank): count for rank, plan in enumerate(plans) for peer, count in plan.first})
    left = [deque(plan.actions) for plan in plans]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(left):
            while actions:
                received = [(value, (source, rank)) for value, source in actions[0].takes if source is not None]
                if any(place[lane, value] >= min(sent[lane], posted[lane]) for value, lane in received):
                    break
                planned = actions.popleft()
                posted.update({(peer, rank): count for peer, count in planned.post})
                sent.update((rank, peer) for _, peer in planned.destinations)
                moved = True
    assert not any(left)
    assert sent == posted == Counter({lane: len(transfers) for lane, transfers in lanes.items()})


def lines_per_action(name: str, ranks: int, microbatches: int) -> float:
    """Lines of Python that run while a table is built, proved and simulated, for each of its actions."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        schedule = build_schedule(name, ranks, microbatches)
        check_schedule(schedule)
        simulate_schedule(schedule)
    finally:
        sys.settrace(before)
    return lines / sum(map(len, schedule.programs))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_work_grows_no_faster_than_the_table(name: str) -> None:
    assert lines_per_action(name, 24, 96) <= 1.1 * lines_per_action(name, 12, 48)


def reference_ends(schedule: Schedule, costs: dict[str, float], send: float) -> dict[Action, float]:
    """Each action's end as the fixed point of "after the one before on its rank, and after what it needs"."""
    before: dict[Action, list[Action]] = {}
    for program in schedule.programs:
        for index, action in enumerate(program):
            kind, stage, microbatch = action
            before[action] = program[max(0, index - 1) : index]
            if kind == "F":
                before[action].append(Action("F", stage - 1, microbatch))
            if kind in "BI":
                before[action] += [Action(other, stage + 1, microbatch) for other in "BI"]
    ends: dict[Action, float] = {}

    def end(action: Action) -> float:
        if action not in ends:
            ready = [
                end(other) + (send if schedule.placement[other.stage] != schedule.placement[action.stage] else 0.0)
                for other in before[action]
                if other in before
            ]
            ends[action] = max(ready, default=0.0) + costs[action.kind]
        return ends[action]

    return {action: end(action) for action in before}


@settings(max_examples=40, deadline=None)
@given(schedules(most_ranks=5, most_microbatches=6), st.sampled_from([0.0, 0.25, 3.0]))
def test_simulation_equals_the_longest_path(schedule: Schedule, send: float) -> None:
    sequential = Schedule(schedule.name, schedule.programs, schedule.placement)  # without interleaving of pairs
    costs = ScheduleCosts(forward=1.5, input_gradient=1.0, weight_gradient=0.75, send=send)
    expected = reference_ends(sequential, {"F": 1.5, "I": 1.0, "W": 0.75, "B": 1.75}, send)
    timeline = simulate_schedule(sequential, costs)
    assert {box.action: box.end for box in timeline.boxes} == pytest.approx(expected)


def bubble_of(name: str, ranks: int, microbatches: int, per_rank: int = 1) -> float:
    return simulate_schedule(build_schedule(name, ranks, microbatches, per_rank)).bubble


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("groups", [2, 3, 5])
def test_bubbles_equal_the_closed_forms(ranks: int, groups: int) -> None:
    """Idle time per rank over the whole, in units of F = I = W = 1, for multiples of the ranks."""
    count = groups * ranks

    def share(idle: float, stages: int) -> float:
        return idle / (3 * count * stages + idle)

    fill = ranks - 1
    assert bubble_of("gpipe", ranks, count) == pytest.approx(share(3 * fill, 1))
    assert bubble_of("1f1b", ranks, count) == pytest.approx(share(3 * fill, 1))
    for stages in (2, 3, 4):
        assert bubble_of("interleaved", ranks, count, stages) == pytest.approx(share(3 * fill, stages))
        assert bubble_of("interleaved-zb", ranks, count, stages) == pytest.approx(share(fill, stages))
        assert bubble_of("looped-bfs", ranks, count, stages) == pytest.approx(share(3 * fill, stages))
    assert bubble_of("zb-h1", ranks, count) == pytest.approx(share(fill, 1))
    assert bubble_of("zb-h2", ranks, count) == pytest.approx(share(fill, 1))
    assert bubble_of("zb-v", ranks, count, 2) == pytest.approx(share(fill, 2))
    assert bubble_of("v-half", ranks, count, 2) <= share(3 * fill, 2) + 1e-12  # half of 1F1B's
    if ranks > 1:
        assert bubble_of("dualpipe-v", ranks, count, 2) == pytest.approx(share(2 * fill, 2))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 13])
def test_peaks_equal_the_closed_forms(ranks: int) -> None:
    count = 3 * ranks

    def peaks(name: str, per_rank: int = 1) -> list[int]:
        return check_schedule(build_schedule(name, ranks, count, per_rank)).peak_activations

    assert peaks("gpipe") == [count] * ranks
    assert peaks("1f1b") == [ranks - rank for rank in range(ranks)]
    assert peaks("looped-bfs", 2) == [2 * count] * ranks
    assert peaks("interleaved", 2) == [3 * ranks - 1 - 2 * rank for rank in range(ranks)]
    assert max(peaks("zb-h1")) == ranks
    assert max(peaks("zb-h2")) == 2 * ranks - 1
    assert max(peaks("interleaved-zb", 3)) == 3 * ranks
    assert max(peaks("zb-v", 2)) == 2 * ranks  # in stages, of which 1F1B's are twice as large
    assert max(peaks("v-half", 2)) <= (ranks + 2) // 2 * 2
    assert max(peaks("dualpipe-v", 2)) == 2 * ranks + 1


def test_zb_h2_never_idles_within_a_rank() -> None:
    timeline = simulate_schedule(build_schedule("zb-h2", 6, 20))
    for rank in range(6):
        boxes = timeline.boxes_of(rank)
        assert boxes[-1].end - boxes[0].start == 60


@pytest.mark.parametrize(
    ("name", "microbatches", "per_rank", "percent"),
    [
        ("gpipe", 8, 1, 27.3),
        ("1f1b", 8, 1, 27.3),
        ("interleaved", 8, 2, 15.8),
        ("zb-h1", 8, 1, 11.1),
        ("interleaved-zb", 8, 2, 5.9),
        ("zb-v", 8, 2, 5.9),
        ("dualpipe-v", 8, 2, 11.1),
    ],
)
def test_published_bubbles_of_four_ranks(name: str, microbatches: int, per_rank: int, percent: float) -> None:
    assert round(100 * bubble_of(name, 4, microbatches, per_rank), 1) == percent


@settings(max_examples=100, deadline=None)
@given(schedules(most_ranks=6, most_microbatches=8), st.randoms(use_true_random=False))
def test_a_dropped_or_doubled_action_is_refused(schedule: Schedule, chance: random.Random) -> None:
    rank = chance.randrange(schedule.ranks)
    index = chance.randrange(len(schedule.programs[rank]))
    action = schedule.programs[rank][index]
    doubled = [list(program) for program in schedule.programs]
    doubled[rank].insert(chance.randrange(len(doubled[rank]) + 1), action)
    with pytest.raises(ScheduleError, match=f"rank {rank}: {action} stands 2 times"):
        check_schedule(Schedule("doubled", doubled, schedule.placement))
    if schedule.microbatches > 1:
        dropped = [list(program) for program in schedule.programs]
        dropped[rank].pop(index)
        with pytest.raises(ScheduleError, match=f"rank {rank}: {action.stage}.{action.microbatch} is missing"):
            check_schedule(Schedule("dropped", dropped, schedule.placement))


@settings(max_examples=100, deadline=None)
@given(schedules(most_ranks=6, most_microbatches=8), st.randoms(use_true_random=False))
def test_a_backward_before_its_forward_is_refused(schedule: Schedule, chance: random.Random) -> None:
    rank = chance.randrange(schedule.ranks)
    program = list(schedule.programs[rank])
    index = chance.choice([i for i, action in enumerate(program) if action.kind in "BIW"])
    action = program[index]
    giver = Action("I" if action.kind == "W" else "F", action.stage, action.microbatch)
    program.remove(action)
    program.insert(program.index(giver), action)
    programs = [program if r == rank else schedule.programs[r] for r in range(schedule.ranks)]
    with pytest.raises(ScheduleError, match=f"rank {rank}: {action} comes before {giver}"):
        check_schedule(Schedule("swapped", programs, schedule.placement))


def test_a_deadlock_between_ranks_names_who_waits_for_what() -> None:
    programs = build_schedule("1f1b", 2, 2).programs
    crossed = [[Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)]]
    crossed.append([Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1)])
    assert sorted(crossed[0]) == sorted(programs[0])
    with pytest.raises(ScheduleError) as caught:
        check_schedule(Schedule("crossed", crossed))
    assert str(caught.value) == (
        "deadlock: rank 0: 0B0 waits for the gradient of microbatch 0 from stage 1 from rank 1; "
        "rank 1: 1F1 waits for the activation of microbatch 1 from stage 0 from rank 0"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda programs: programs[0].append(Action("F", 1, 0)), "1F0 is on rank 0, but stage 1|1F0 is on rank 1, but"),
        (lambda programs: programs[1].append(Action("F", 3, 0)), "stage 2 has no action"),
        (lambda programs: programs[1].append(Action("W", 1, 0)), "1B0 is a whole backward, but 1W0 stands there too"),
        (lambda programs: programs[1].remove(Action("F", 1, 1)), "1F1 is missing: microbatch 1 never runs forward"),
    ],
)
def test_wrong_tables_are_named(change: object, message: str) -> None:
    programs = [list(program) for program in build_schedule("gpipe", 2, 2).programs]
    change(programs)  # type: ignore[operator]
    with pytest.raises(ScheduleError, match=message):
        check_schedule(Schedule("wrong", programs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f2b", 2, 2), "did you mean 1f1b"),
        (("spiral", 2, 2), "choose one of gpipe"),
        (("1f1b", 2, 0), "microbatches is 0"),
        (("1f1b", 2, 4, 2), "choose interleaved"),
        (("zb-v", 2, 4, 3), "has two stages per rank"),
    ],
)
def test_wrong_sizes_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_schedule(*arguments)


def test_costs_may_differ_by_stage_and_sends_may_hold_the_rank() -> None:
    schedule = build_schedule("gpipe", 2, 2)
    uneven = simulate_schedule(schedule, ScheduleCosts(forward=[1.0, 3.0], input_gradient=0.0, weight_gradient=1.0))
    assert uneven.makespan == 1 + 3 + 3 + 1 + 1 + 1
    held = simulate_schedule(schedule, ScheduleCosts(send=1.0, overlap=False))
    free = simulate_schedule(schedule, ScheduleCosts(send=1.0))
    # 0F0 |send| 0F1 |send| against 0F0 0F1 with the sends behind them
    assert held.boxes_of(0)[1].start == 2
    assert free.boxes_of(0)[1].start == 1
    with pytest.raises(ValueError, match="forward has 3 costs for 2 stages"):
        simulate_schedule(schedule, ScheduleCosts(forward=[1.0, 2.0, 3.0]))


@settings(max_examples=30, deadline=None)
@given(schedules(most_ranks=5, most_microbatches=6))
def test_a_link_without_queue_costs_its_latency_and_bytes(schedule: Schedule) -> None:
    def between(source: int, destination: int) -> Link:
        return Link(0.25, bandwidth=source + 1.0, queues=False)

    def number(source: int, destination: int) -> float:
        return 0.25 + 2.0 / (source + 1)

    linked = simulate_schedule(schedule, ScheduleCosts(send=between, send_bytes=2.0))
    assert linked.boxes == simulate_schedule(schedule, ScheduleCosts(send=number)).boxes


@settings(max_examples=30, deadline=None)
@given(schedules(most_ranks=5, most_microbatches=6), st.sampled_from([0.5, 2.0, 5.0]))
def test_sends_on_one_link_queue(schedule: Schedule, busy: float) -> None:
    """Nothing starts before its value can have come: after its own send and, one by one, those before it."""
    timeline = simulate_schedule(schedule, ScheduleCosts(send=Link(1.0, bandwidth=10.0), send_bytes=10.0 * busy))
    starts = {box.action: box.start for box in timeline.boxes}
    ends = {box.action: box.end for box in timeline.boxes}
    if schedule.overlapped:  # a pair gives its values at its end
        return
    for (source, destination), lane in traffic(schedule).items():
        arrivals, free = {}, 0.0
        for transfer in lane:
            free = max(free, ends[schedule.programs[source][transfer.produced_by]]) + busy
            arrivals[schedule.programs[destination][transfer.needed_by]] = free + 1.0
        assert all(starts[action] >= arrival - 1e-9 for action, arrival in arrivals.items())
    free_links = simulate_schedule(schedule, ScheduleCosts(send=Link(1.0, 10.0, queues=False), send_bytes=10.0 * busy))
    assert timeline.makespan >= free_links.makespan - 1e-9


def test_a_full_link_sets_the_pace() -> None:
    """gpipe on two ranks: forwards of 1, sends that hold the link for 3."""
    timeline = simulate_schedule(
        build_schedule("gpipe", 2, 3), ScheduleCosts(send=Link(latency=0.5, bandwidth=2.0), send_bytes=6.0)
    )
    assert [box.start for box in timeline.boxes_of(1)[:3]] == [1 + 3 + 0.5, 1 + 6 + 0.5, 1 + 9 + 0.5]


def test_actions_read_and_write_their_text() -> None:
    assert str(Action("F", 2, 0)) == "2F0"
    assert Action.parse("12W34") == Action("W", 12, 34)
    with pytest.raises(ScheduleError, match="'2X0' is no action"):
        Action.parse("2X0")
