"""The simulator that the planner runs, against published bubble rates of six schedules."""

import csv
from itertools import accumulate
from pathlib import Path

import pytest

from weft.parallel import Schedule, ScheduleCosts, build_schedule, simulate_schedule
from weft.parallel.pipeline.search import search_schedule, share_costs
from weft.parallel.pipeline.timeline import Timeline

REFERENCE = Path(__file__).parents[3] / "../shared/data/zero_bubble_reference.csv"

# Qi et al. 2023, tables 5 and 9: ranks, microbatches, milliseconds of F, B, W and a send; stages per rank of the
# interleaved schedule; bubbles of 1F1B, interleaved, ZB-H1, ZB-1p, ZB-2p
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 3, 0.2431, 0.1055, 0.1585, 0.1585, 0.0433),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 4, 0.2347, 0.0808, 0.1323, 0.1323, 0.0029),
]
STAGES_PER_RANK = {"1.5B": 3, "6.2B": 4, "14.6B": 3, "28.3B": 2}


def published() -> list[tuple[float, ...]]:
    """The two settings above, and all of the reference where it is at hand."""
    rows = list(PUBLISHED)
    if REFERENCE.exists():
        with REFERENCE.open(newline="") as file:
            for row in csv.DictReader(file):
                costs = [float(row[f"T_{name}_ms"]) for name in ("F", "B", "W", "comm")]
                names = ("1F1B", "1F1B_I", "ZB_H1", "ZB_1p", "ZB_2p")
                bubbles = [float(row[f"bubble_{name}"]) for name in names]
                several = STAGES_PER_RANK.get(row["model"], 2)
                rows.append((int(row["p"]), int(row["m"]), *costs, several, *bubbles))
    return [row for row in dict.fromkeys(rows) if row[0] * row[1] <= 2048]


def bubble(timeline: Timeline) -> float:
    """Idle share of the longest rank's time, from its first start to its last end (§5.2): ranks go on by themselves."""
    return 1 - max(timeline.busy) / max(timeline.spans)


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row[0]} ranks, {row[1]} microbatches")
def test_bubbles_are_the_published_ones(row: tuple[float, ...]) -> None:
    ranks, microbatches, forward, inputs, weights, send, several, plain, interleaved, h1, *_ = row
    costs = ScheduleCosts(forward, inputs, weights, send)

    def rate(name: str, stages: int = 1) -> float:
        schedule = build_schedule(name, int(ranks), int(microbatches), stages)
        return bubble(simulate_schedule(schedule, share_costs(costs, stages)))

    assert rate("1f1b") == pytest.approx(plain, abs=1e-4)
    assert rate("zb-h1") == pytest.approx(h1, abs=1e-4)
    assert rate("interleaved", int(several)) == pytest.approx(interleaved, abs=4e-3)


def waiting_for_backward(schedule: Schedule) -> int:
    """The most microbatches that any rank holds whose input gradient is not computed yet."""
    change = {"F": 1, "B": -1, "I": -1, "W": 0}
    return max(max(accumulate(change[kind] for kind, *_ in program)) for program in schedule.programs)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]} ranks, {row[1]} microbatches")
def test_the_search_is_as_good_as_the_published_zero_bubble_schedules(row: tuple[float, ...]) -> None:
    """ZB-1p and ZB-2p hold p and 2 p activations; what still waits for its weight gradient counts for less there."""
    ranks, microbatches, forward, inputs, weights, send, *_, one, two = row
    costs = ScheduleCosts(forward, inputs, weights, send)
    for activations, published_rate, whole in ((ranks, one, ranks), (4 * ranks, two, 2 * ranks)):
        found = search_schedule(int(ranks), int(microbatches), costs, activations=activations, joined=False)
        timeline = simulate_schedule(found.schedule, share_costs(costs, found.stages_per_rank))
        assert bubble(timeline) <= published_rate + 5e-5
        assert waiting_for_backward(found.schedule) <= whole * found.stages_per_rank
