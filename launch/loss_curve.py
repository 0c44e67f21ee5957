"""The loss over the steps as an SVG drawing, in colours that the page around it decides."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from weft.launch.metrics import StepMetrics
from weft.launch.svg import draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_INCHES = (5.8, 3.1)
_MOST_POINTS = 600

_TRAIN, _HELD_OUT = "#030303", "#040404"
_COLOURS = {_TRAIN: "var(--train)", _HELD_OUT: "var(--held-out)"}


def draw_loss_curve(metrics: Sequence[StepMetrics]) -> str:
    """Train and held-out loss in nats per token over the steps, as an `<svg>` element without a fixed size."""
    return draw_svg(lambda axes: _draw(axes, metrics), name="loss", inches=_INCHES, colours=_COLOURS)


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
