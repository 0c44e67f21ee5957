"""The loss over the steps as an SVG drawing, in colours that the page around it decides."""

import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from weft.launch.metrics import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_INCHES = (5.8, 3.1)
_MOST_POINTS = 600

# matplotlib writes fixed colours; these stand for the style sheet's names and are replaced by them.
_INK, _LINES, _TRAIN, _HELD_OUT = "#010101", "#020202", "#030303", "#040404"
_NAMES = {_INK: "currentColor", _LINES: "var(--line)", _TRAIN: "var(--train)", _HELD_OUT: "var(--held-out)"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be read aloud
    "svg.hashsalt": "weft",  # the same curve gives the same file
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINES,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINES,
    "grid.linewidth": 0.5,
    "xtick.color": _LINES,
    "ytick.color": _LINES,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def draw_loss_curve(metrics: Sequence[StepMetrics]) -> str:
    """Train and held-out loss in nats per token over the steps, as an `<svg>` element without a fixed size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        _draw(figure.subplots(), metrics)
        written = io.StringIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_the_page(written.getvalue())


def _draw(axes: "Axes", metrics: Sequence[StepMetrics]) -> None:
    train = [(float(entry.step), entry.loss) for entry in metrics if entry.loss is not None]
    held_out = [(float(entry.step), entry.held_out_loss) for entry in metrics if entry.held_out_loss is not None]
    if train:
        axes.plot(*zip(*_thinned(train), strict=True), color=_TRAIN, linewidth=1.3, label="train")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color=_HELD_OUT, linewidth=1.8, marker="o", markersize=4, label="held-out"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    if train or held_out:
        axes.legend(frameon=False)


def _thinned(points: list[Point]) -> list[Point]:
    """At most `_MOST_POINTS`, each the mean of its neighbours: a long run must not make a heavy page."""
    size = -(-len(points) // _MOST_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(step for step, _ in group), fmean(loss for _, loss in group)) for group in groups]


def _for_the_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = head[head.index('viewBox="') :].split('"')[1]
    for colour, name in _NAMES.items():
        body = body.replace(colour, name)
    return f'<svg viewBox="{view_box}" xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">{body}'
