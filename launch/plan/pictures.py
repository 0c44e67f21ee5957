"""Pictures of a plan, as SVG for its page: memory, time, the frontier between both, and the best layout's pipeline."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weft.launch.plan.block import Model
from weft.launch.plan.drawing import drawn_timeline
from weft.launch.plan.search import Candidate, Plan
from weft.launch.plan.stages import stage_times
from weft.launch.svg import INK, draw_svg
from weft.launch.timelines import timeline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS, TIMELINE_RANKS, TIMELINE_ROUNDS = 8, 32, 3
# told apart by people who do not see all colours (Okabe and Ito 2008)
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8a8f98", "#7a5cc0")


def memory_svg(plan: Plan) -> str:
    """Bytes by kind of the best layouts, and the limit."""
    limit = plan.cluster.memory_bytes / 2**30
    rows = [{kind: size / 2**30 for kind, size in one.memory.parts.items()} for one in plan.fitting[:BARS]]

    def finish(axes: "Axes") -> None:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("GiB of the fullest rank; the dashed line is what a device has")
        axes.set_xlim(0, 1.04 * limit)

    return _bars("plan-memory", rows, finish)


def time_svg(plan: Plan) -> str:
    """Seconds by kind of the best layouts."""
    rows = [one.time.parts for one in plan.fitting[:BARS]]

    def finish(axes: "Axes") -> None:
        axes.set_xlabel("seconds of a step")

    return _bars("plan-time", rows, finish)


def frontier_svg(plan: Plan) -> str:
    """Memory against step time of the layouts that were simulated, and of the fastest that do not fit."""

    from matplotlib.ticker import LogLocator

    def draw(axes: "Axes") -> None:
        for candidates, hue, label in ((plan.rejected, HUES[5], "do not fit"), (plan.fitting, HUES[0], "fit")):
            seconds, sizes = [one.time.total for one in candidates], [one.memory.total / 2**30 for one in candidates]
            if candidates:
                axes.scatter(seconds, sizes, s=14, color=hue, label=label, linewidths=0, alpha=0.75)
        edge = [(one.time.total, one.memory.total / 2**30) for one in _frontier([*plan.fitting, *plan.rejected])]
        axes.step(*zip(*edge, strict=True), where="post", color=INK, linewidth=1, label="frontier")
        axes.axhline(plan.cluster.memory_bytes / 2**30, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.set_xscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
            axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.set_xlabel("seconds of a step")
        axes.set_ylabel("GiB of the fullest rank")
        axes.legend(frameon=False)

    return draw_svg(draw, name="plan-frontier", inches=(7.2, 4.0))


def pipeline_svg(plan: Plan) -> str | None:
    """The best layout's pipeline in time, as simulated, of no more microbatches than show its shape."""
    layout, space = plan.best.layout, plan.space
    if not 1 < layout.pipeline <= TIMELINE_RANKS:
        return None
    times = stage_times(Model(space.shape, space.job, layout, space.recipe, plan.cluster))
    return timeline_svg(*drawn_timeline(plan, times, layout, most=TIMELINE_ROUNDS * layout.pipeline))


def _frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and memory, fastest first."""
    edge: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.time.total, one.memory.total)):
        if not edge or one.memory.total < edge[-1].memory.total:
            edge.append(one)
    return edge


def _bars(name: str, rows: Sequence[dict[str, float]], finish: Callable[["Axes"], None]) -> str:
    """A bar for each row, cut into its kinds; kinds that are nowhere seen are left out."""
    most = max(sum(row.values()) for row in rows)
    kinds = [kind for kind in rows[0] if max(row[kind] for row in rows) > 0.003 * most]

    def draw(axes: "Axes") -> None:
        starts = [0.0] * len(rows)
        for kind, hue in zip(kinds, HUES, strict=False):
            lengths = [row[kind] for row in rows]
            axes.barh(range(1, len(rows) + 1), lengths, left=starts, color=hue, label=kind, height=0.68)
            starts = [start + length for start, length in zip(starts, lengths, strict=True)]
        axes.set_yticks(range(1, len(rows) + 1))
        axes.set_ylabel("place in the table")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
        finish(axes)

    return draw_svg(draw, name=name, inches=(7.2, 1.5 + 0.32 * len(rows)))
