"""Shows a timeline, simulated or measured: as coloured text, as SVG or PNG, or as a trace for ui.perfetto.dev."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.parallel.pipeline.check import peak_activations
from weft.parallel.pipeline.table import KINDS, Action
from weft.parallel.pipeline.timeline import Box, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[int, int, int]

# A hue for each kind; a rank's later stages are drawn lighter.
HUES: dict[str, Colour] = {"F": (49, 104, 173), "B": (34, 125, 81), "I": (0, 140, 150), "W": (208, 135, 29)}
PICTURE_SUFFIXES = (".svg", ".png")
MOST_BOXES = 200_000
MOST_LINES = 64  # ranks that are drawn as text
MOST_PEAKS = 8  # runs of ranks in a caption


def draw_timeline(timeline: Timeline, path: str | Path, *, title: str) -> None:
    """Write a picture (`.svg`, `.png`) or a Perfetto trace (`.json`), by the suffix of `path`.

    Raises:
        ValueError: another suffix, or more boxes than a picture can hold.
    """
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(_trace(timeline, title)))
    elif path.suffix in PICTURE_SUFFIXES:
        _draw_picture(timeline, path, title)
    else:
        raise ValueError(f"cannot draw to {path}: choose a name that ends in .svg, .png or .json")


def caption(timeline: Timeline, title: str) -> str:
    """Name, length, bubble, and the activations that ranks hold at most, in one line."""
    runs = [f"{'–'.join(ranks)}: {peak}" for ranks, peak in _runs(peak_activations(timeline.programs))]
    peaks = ", ".join(runs if len(runs) <= MOST_PEAKS else [*runs[: MOST_PEAKS - 1], "…", runs[-1]])
    bubble = f"bubble {100 * timeline.bubble:.1f} %"
    return f"{title} · length {timeline.makespan:.6g} · {bubble} · peak activations by rank {peaks}"


def _runs(peaks: Sequence[int]) -> Iterator[tuple[list[str], int]]:
    """Neighbouring ranks of the same peak, as first and last rank."""
    for peak, members in groupby(enumerate(peaks), key=lambda item: item[1]):
        ranks = [rank for rank, _ in members]
        yield [str(rank) for rank in sorted({ranks[0], ranks[-1]})], peak


def _shades(program: Sequence[Action]) -> dict[tuple[str, int], Colour]:
    """The colour of each (kind, stage) of a rank."""
    stages = sorted({action.stage for action in program})
    return {
        (kind, stage): _lighten(hue, 0.5 * place / max(1, len(stages) - 1) if place else 0.0)
        for kind, hue in HUES.items()
        for place, stage in enumerate(stages)
    }


def _lighten(colour: Colour, share: float) -> Colour:
    red, green, blue = (round(part + (255 - part) * share) for part in colour)
    return red, green, blue


def _ink(colour: Colour) -> Colour:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = colour
    return (255, 255, 255) if 0.299 * red + 0.587 * green + 0.114 * blue < 150 else (0, 0, 0)


# Text


def timeline_text(timeline: Timeline, *, title: str, width: int, colour: bool) -> str:
    """One line per rank, `width` columns wide: boxes with their microbatch where it fits, blanks for bubbles.

    Of more than `MOST_LINES` ranks the first and the last are drawn. A column holds one box, however many fall into it.
    """
    margin = len(f"rank {timeline.ranks - 1} ")
    scale = _columns_per_unit(timeline, max(1, width - margin))
    left_out = max(0, timeline.ranks - MOST_LINES)
    drawn = [rank for rank in range(timeline.ranks) if not 0 <= rank - MOST_LINES // 2 < left_out]
    lines = [f"rank {rank}".ljust(margin) + _line(timeline, rank, scale, colour=colour) for rank in drawn]
    if left_out:
        lines.insert(MOST_LINES // 2, f"… {left_out} ranks in between")
    programs = [timeline.programs[rank] for rank in drawn]
    kinds = [kind for kind in KINDS if any(action.kind == kind for program in programs for action in program)]
    legend = "  ".join(_paint(f" {kind} ", HUES[kind], colour=colour) + " " + KINDS[kind] for kind in kinds)
    shading = "; a rank's later stages lighter" if colour and any(len(_stages(p)) > 1 for p in programs) else ""
    return "\n".join([*lines, "", caption(timeline, title), legend + "  (numbers: microbatches" + shading + ")"])


def _stages(program: Sequence[Action]) -> set[int]:
    return {action.stage for action in program}


def _columns_per_unit(timeline: Timeline, width: int) -> float:
    """Whole columns per unit of time where that uses most of the width, so that equal boxes look equal."""
    scale = width / timeline.makespan if timeline.makespan else 1.0
    whole = float(int(scale))
    return whole if whole >= 0.6 * scale and whole else scale


def _line(timeline: Timeline, rank: int, scale: float, *, colour: bool) -> str:
    shades = _shades(timeline.programs[rank])
    pieces, at = [], 0
    for box in timeline.boxes_of(rank):
        first, last = (round((time - timeline.start) * scale) for time in (box.start, box.end))
        if last <= max(first, at):
            continue  # narrower than a column
        first = max(first, at)
        shade = shades[box.action.kind, box.action.stage]
        pieces.append(" " * (first - at) + _paint(_label(box, last - first, colour=colour), shade, colour=colour))
        at = last
    return "".join(pieces)


def _label(box: Box, width: int, *, colour: bool) -> str:
    """The microbatch, or its last digit where only that fits; without colours, the kind before it."""
    number = str(box.action.microbatch)
    if colour:
        return (number if len(number) <= width else number[-1]).ljust(width)
    return (box.action.kind + number)[:width].ljust(width, "-")


def _paint(text: str, shade: Colour, *, colour: bool) -> str:
    if not colour:
        return text
    ink = ";".join(map(str, _ink(shade)))
    return f"\x1b[48;2;{';'.join(map(str, shade))};38;2;{ink}m{text}\x1b[0m"


# Pictures


def _draw_picture(timeline: Timeline, path: Path, title: str) -> None:
    count = sum(map(len, timeline.programs))
    if count > MOST_BOXES:
        raise ValueError(f"{count} boxes are too many for a picture; choose .json, or fewer ranks or microbatches")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    row = 0.34 if timeline.ranks <= 32 else 0.12
    width = _inches(timeline)
    height = row * timeline.ranks + 1.5
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _draw_boxes(axes, timeline, points_per_unit=72 * (width - 1.2) / (timeline.makespan or 1.0))
    _dress(axes, timeline, title)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # text as text, and the same file every time
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_boxes(axes: "Axes", timeline: Timeline, points_per_unit: float) -> None:
    for rank in range(timeline.ranks):
        boxes = timeline.boxes_of(rank)
        shades = _shades(timeline.programs[rank])
        colours = [shades[box.action.kind, box.action.stage] for box in boxes]
        axes.broken_barh(
            [(box.start - timeline.start, box.end - box.start) for box in boxes],
            (rank - 0.42, 0.84),
            facecolors=[_fraction(colour) for colour in colours],
            edgecolors="white",
            linewidth=0.4 if len(boxes) < 400 else 0.0,
        )
        for box, colour in zip(boxes, colours, strict=True):
            number = str(box.action.microbatch)
            if timeline.ranks <= 32 and (box.end - box.start) * points_per_unit > 4.6 * len(number) + 1.5:
                middle = (box.start + box.end) / 2 - timeline.start
                axes.text(
                    middle, rank, number, ha="center", va="center_baseline", fontsize=7, color=_fraction(_ink(colour))
                )


def _dress(axes: "Axes", timeline: Timeline, title: str) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(timeline.ranks - 0.4, -0.6)
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=32, integer=True))
    axes.set_ylabel("rank")
    axes.set_xlabel("time")
    axes.spines[["top", "right"]].set_visible(False)
    name, *facts = caption(timeline, title).split(" · ")
    axes.set_title(f"{name}\n" + " · ".join(facts), fontsize=9, loc="left")
    kinds = {action.kind for program in timeline.programs for action in program}
    handles = [Patch(color=_fraction(HUES[kind]), label=name) for kind, name in KINDS.items() if kind in kinds]
    if any(len(_stages(program)) > 1 for program in timeline.programs):
        handles.append(Patch(color=_fraction(_lighten(HUES["F"], 0.5)), label="later stage of the rank"))
    axes.figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="outside lower center", frameon=False)


def _inches(timeline: Timeline) -> float:
    """A width at which a number fits into the usual box."""
    lengths = sorted(box.end - box.start for box in timeline.boxes)
    usual = lengths[len(lengths) // 4] if lengths else 0.0
    return min(24.0, max(9.0, 1.2 + 0.17 * timeline.makespan / usual)) if usual else 9.0


def _fraction(colour: Colour) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


# Trace


def _trace(timeline: Timeline, title: str) -> dict[str, Any]:
    """Chrome's trace-event format, which Perfetto reads: one track per rank; one unit of time is shown as a second."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": caption(timeline, title)}},
    ]
    for rank in range(timeline.ranks):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        for box in timeline.boxes_of(rank):
            events.append(
                {
                    "ph": "X",
                    "name": str(box.action),
                    "cat": KINDS[box.action.kind],
                    "pid": 0,
                    "tid": rank,
                    "ts": (box.start - timeline.start) * 1e6,
                    "dur": (box.end - box.start) * 1e6,
                    "args": {"stage": box.action.stage, "microbatch": box.action.microbatch},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
