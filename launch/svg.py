"""Drawings as SVG inside a page, in colours that the page around them decides."""

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib writes fixed colours; these stand for the style sheet's names and are replaced by them.
INK, LINES = "#010101", "#020202"
_NAMES = {INK: "currentColor", LINES: "var(--line)"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be read aloud
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINES,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINES,
    "grid.linewidth": 0.5,
    "xtick.color": LINES,
    "ytick.color": LINES,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def draw_svg(
    draw: Callable[["Axes"], None], *, name: str, inches: tuple[float, float], colours: Mapping[str, str] | None = None
) -> str:
    """What `draw` draws, as an `<svg>` element without a fixed size.

    Args:
        name: of the picture, unlike those of others in the same page.
        colours: for colours that `draw` uses, what the page calls them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # the same picture gives the same file, and two in one page share no identifiers
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.subplots())
        written = io.StringIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_the_page(written.getvalue(), {**_NAMES, **(colours or {})})


def _for_the_page(svg: str, colours: Mapping[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = head[head.index('viewBox="') :].split('"')[1]
    for colour, name in colours.items():
        body = body.replace(colour, name)
    return f'<svg viewBox="{view_box}" xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">{body}'
