"""Pictures of a run's pipeline: one step as measured, and the same schedule simulated with the measured costs."""

import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.draw import draw_timeline
from weft.parallel.pipeline.simulate import simulate_schedule
from weft.parallel.pipeline.table import Schedule
from weft.parallel.pipeline.timeline import Timeline


def measured_costs(timeline: Timeline, stages: int) -> ScheduleCosts:
    """The mean time of each kind of action on each stage, communication left out.

    A whole backward is counted half for the input and half for the weights.
    """
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for box in timeline.boxes:
        times[box.action.kind, box.action.stage].append(box.end - box.start)

    def of(kind: str, stage: int) -> float:
        if times[kind, stage]:
            return mean(times[kind, stage])
        return mean(times["B", stage]) / 2 if times["B", stage] else 0.0

    forward, input_gradient, weight_gradient = ([of(kind, stage) for stage in range(stages)] for kind in "FIW")
    return ScheduleCosts(forward, input_gradient, weight_gradient)


def timeline_pictures(timeline: Timeline, schedule: Schedule) -> dict[str, str]:
    """The measured and the simulated timeline as SVG, by a title."""
    simulated = simulate_schedule(schedule, measured_costs(timeline, schedule.stages))
    return {
        "As measured": timeline_svg(timeline, f"{schedule.name}, measured, in seconds"),
        "As simulated with the measured costs, without communication": timeline_svg(
            simulated, f"{schedule.name}, simulated, in seconds"
        ),
    }


def timeline_svg(timeline: Timeline, title: str) -> str:
    """The picture as an `<svg>` element."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.svg"
        draw_timeline(timeline, path, title=title)
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
