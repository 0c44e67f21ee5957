"""The pipeline of a layout in time, of no more ranks and microbatches than a picture can show."""

from weft.launch.plan import pipeline
from weft.launch.plan.layout import Layout
from weft.launch.plan.search import Plan, Planner
from weft.launch.plan.stages import StageTimes
from weft.parallel.pipeline.draw import timeline_text
from weft.parallel.pipeline.timeline import Timeline

LEAST_COLUMNS = 3  # of a microbatch's forward and backward


def drawn_timeline(plan: Plan, times: StageTimes, layout: Layout, *, most: int) -> tuple[Timeline, str]:
    """The timeline of at most `most` microbatches, as simulated, and its title."""
    whole = layout.microbatches(plan.space.job)
    count = min(whole, most)
    shown = pipeline.timeline(layout, times, count, times.send)
    of_all = f"{count} microbatches" if count == whole else f"{count} of {whole} microbatches"
    return shown, f"{layout.schedule}, {of_all}, in seconds"


def best_timeline_text(plan: Plan, planner: Planner, *, width: int, colour: bool) -> str | None:
    """The pipeline of the best layout in `width` columns; None where there is none, or it is too wide or high."""
    layout = plan.best.layout
    most = width // LEAST_COLUMNS - layout.pipeline
    if layout.pipeline == 1 or most < layout.pipeline:
        return None
    shown, title = drawn_timeline(plan, planner.times_of(layout), layout, most=min(most, 2 * layout.pipeline))
    return timeline_text(shown, title=title, width=width, colour=colour)
