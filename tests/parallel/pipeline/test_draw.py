"""Drawings show each box where it is, for simulated and for measured timelines."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from weft.parallel import Timeline, build_schedule, simulate_schedule
from weft.parallel.pipeline.draw import caption, draw_timeline, timeline_text


def simulated(name: str, ranks: int = 4, microbatches: int = 6) -> Timeline:
    return simulate_schedule(build_schedule(name, ranks, microbatches))


def test_text_has_a_box_for_every_action_and_blanks_for_bubbles() -> None:
    timeline = simulated("1f1b")
    lines = timeline_text(timeline, title="1f1b", width=120, colour=False).splitlines()
    for rank in range(4):
        drawn = lines[rank].removeprefix(f"rank {rank} ")
        assert re.findall(r"[FB]\d", drawn) == [a.kind + str(a.microbatch) for a in timeline.programs[rank]]
        inside = drawn.rstrip()
        idle = timeline.makespan - timeline.busy[rank]
        blanks = inside.count(" ") + (round(timeline.makespan) * 4 - len(inside))
        assert blanks == pytest.approx(4 * idle)  # four columns per unit of time fit


def test_text_in_colour_is_the_same_picture() -> None:
    timeline = simulated("zb-v")
    coloured = timeline_text(timeline, title="zb-v", width=100, colour=True)
    plain = timeline_text(timeline, title="zb-v", width=100, colour=False)
    stripped = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [len(line) for line in stripped.splitlines()[:4]] == [len(line) for line in plain.splitlines()[:4]]
    assert len(set(re.findall(r"\x1b\[48;2;(\d+;\d+;\d+)", coloured))) == 6  # three kinds on two stages


@pytest.mark.parametrize("width", [1, 20, 300])
def test_text_fits_any_width(width: int) -> None:
    for line in timeline_text(simulated("dualpipe-v", 3, 30), title="t", width=width, colour=False).splitlines()[:3]:
        assert len(line) <= max(width, len("rank 0 ") + 1)


def test_caption_tells_bubble_and_memory() -> None:
    assert caption(simulated("1f1b", 4, 8), "1f1b") == (
        "1f1b · length 33 · bubble 27.3 % · peak activations by rank 0: 4, 1: 3, 2: 2, 3: 1"
    )
    assert caption(simulated("zb-h1", 4, 8), "zb-h1").endswith("by rank 0–3: 4")


def test_text_of_many_ranks_shows_the_first_and_the_last() -> None:
    lines = timeline_text(simulated("1f1b", 100, 2), title="1f1b", width=80, colour=False).splitlines()
    drawn = [int(line.split()[1]) for line in lines if line.startswith("rank ")]
    assert drawn == [*range(32), *range(68, 100)]
    assert lines[32] == "… 36 ranks in between"
    assert "by rank 0–98: 2, 99: 1" in lines[-2]


def test_caption_leaves_out_what_no_line_holds() -> None:
    peaks = caption(simulated("1f1b", 9, 20), "1f1b").partition("by rank ")[2]
    assert peaks == "0: 9, 1: 8, 2: 7, 3: 6, 4: 5, 5: 4, 6: 3, …, 8: 1"


def test_pictures_carry_numbers_and_caption(tmp_path: Path) -> None:
    timeline = simulated("zb-h1")
    draw_timeline(timeline, tmp_path / "a.svg", title="zb-h1 of four")
    texts = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "zb-h1 of four" in texts
    assert sum(text == "5" for text in texts) >= 12  # F, I and W of microbatch 5 on four ranks
    draw_timeline(timeline, tmp_path / "a.png", title="zb-h1")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_trace_holds_every_box_of_a_measured_timeline(tmp_path: Path) -> None:
    programs = build_schedule("1f1b", 2, 1).programs
    measured = Timeline(programs, [[100.0, 100.5], [100.2, 100.3]], [[100.1, 100.7], [100.3, 100.4]])
    draw_timeline(measured, tmp_path / "a.json", title="measured")
    events = [event for event in json.loads((tmp_path / "a.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["tid"]) for event in events] == [("0F0", 0), ("0B0", 0), ("1F0", 1), ("1B0", 1)]
    assert [event["ts"] for event in events] == pytest.approx([0.0, 0.5e6, 0.2e6, 0.3e6])
    assert [event["dur"] for event in events] == pytest.approx([0.1e6, 0.2e6, 0.1e6, 0.1e6])


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose a name that ends in \.svg, \.png or \.json"):
        draw_timeline(simulated("1f1b"), tmp_path / "a.pdf", title="1f1b")
