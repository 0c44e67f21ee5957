"""The report: one file that needs nothing else, says what was measured, and lets no text of the run become markup."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from weft.launch.corpus import CorpusInfo
from weft.launch.loss_curve import draw_loss_curve
from weft.launch.metrics import MetricsWriter, StepMetrics
from weft.launch.report import RankReport, RunReport, Sample, write_report
from weft.launch.tokens import TokenInfo

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "</pre><script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Elements, text and links of a page; fails on tags that do not close in order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def run() -> RunReport:
    corpus = CorpusInfo("builtin", 418, 1_933_665, 16, 45_762, "ea9beb1e" * 8, "3.11.7")
    ranks = [
        RankReport(
            rank=rank,
            coordinates={"pipeline": rank // 2, "data": 0, "context": 0, "tensor": rank % 2},
            device="host cpu",
            holds=f"stage {rank // 2}",
            memory_bytes=100_000_000 * (rank + 1),
        )
        for rank in range(4)
    ]
    return RunReport(
        name="demo",
        settings="name: demo\n",
        axes={"pipeline": 2, "data": 1, "context": 1, "tensor": 2},
        ranks=ranks,
        parameters=4_000_000,
        trained_tokens=1_638_400,
        seconds=81.0,
        tokens=TokenInfo(corpus, 2048, 0, 620_489, 14_398, 3.18),
        timelines={"As measured": '<svg viewBox="0 0 10 10"><rect width="5" height="5"></rect></svg>'},
        sample=Sample(prompt="The ", text="end."),
    )


def write_metrics(directory: Path, loss: float = 5.0) -> None:
    with MetricsWriter(directory, tensorboard=False) as writer:
        writer.write(StepMetrics(step=0, held_out_loss=7.7, bits_per_byte=3.49))
        for step in range(1, 21):
            writer.write(StepMetrics(step=step, loss=loss + 2 / step, bubble=0.14))
        writer.write(StepMetrics(step=21, loss=loss, held_out_loss=4.81, bits_per_byte=2.18, bubble=0.125))


def test_page_tells_the_results(tmp_path: Path, run: RunReport) -> None:
    write_metrics(tmp_path)
    page = Page(write_report(tmp_path, run))
    for words in (
        *("7.70 → 4.81", "3.49 → 2.18", "1.64M", "in 21 steps", "1:21", "20.2k", "12.5%", "pipeline 2 × tensor 2"),
        *("4,000,000 parameters", "400 MB", "ea9beb1e" * 8, "torch 2.", "name: demo", "The end."),
    ):
        assert words in page.text, words
    assert not re.search(r"\bNone\b|\bnan\b|\{\{", page.text)


def test_page_needs_nothing_else(tmp_path: Path, run: RunReport) -> None:
    write_metrics(tmp_path)
    file = write_report(tmp_path, run)
    names = {tag for tag, _ in Page(file).elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed"}
    links = [value for _, found in Page(file).elements for key, value in found.items() if key in ("src", "href")]
    assert not [link for link in links if not str(link).startswith("#")]
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", file.read_text(encoding="utf-8")))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, "namespaces alone"
    assert "default-src 'none'" in file.read_text(encoding="utf-8")


def test_text_of_the_run_never_becomes_markup(tmp_path: Path, run: RunReport) -> None:
    write_metrics(tmp_path)
    ranks = [replace(rank, device=HOSTILE, holds=HOSTILE) for rank in run.ranks]
    sample = Sample(prompt=HOSTILE, text=HOSTILE)
    page = Page(write_report(tmp_path, replace(run, name=HOSTILE, settings=HOSTILE, ranks=ranks, sample=sample)))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) >= 4 + 2 * len(ranks)


def test_bars_are_in_proportion(tmp_path: Path, run: RunReport) -> None:
    write_metrics(tmp_path)
    page = Page(write_report(tmp_path, run))
    widths = [str(found["style"]) for _, found in page.elements if found.get("class") == "bar"]
    assert widths == ["width: 25.0%", "width: 50.0%", "width: 75.0%", "width: 100.0%"]


def test_pictures_are_told_in_words_and_scrolling_parts_take_the_keyboard(tmp_path: Path, run: RunReport) -> None:
    write_metrics(tmp_path)
    page = Page(write_report(tmp_path, run))
    pictures = [found for _, found in page.elements if found.get("role") in ("img", "region")]
    assert len(pictures) >= 4
    assert all(found["aria-label"] for found in pictures)
    assert "from 7.70 at step 0 to 4.81 at step 21" in str(pictures[0]["aria-label"])
    scrolling = [found for _, found in page.elements if "scroll" in str(found.get("class", "")).split()]
    assert all(found.get("tabindex") == "0" for found in scrolling)


def test_colours_are_legible_in_light_and_dark(tmp_path: Path, run: RunReport) -> None:
    """Contrast of WCAG 2.2: at least 4.5 for text, 3 for lines of a drawing."""
    style = write_report(tmp_path, run).read_text(encoding="utf-8")
    palettes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]+)\}", style)]
    assert len(palettes) == 2
    for colours in palettes:
        for text in ("ink", "soft"):
            assert contrast(colours[text], colours["page"]) >= 4.5
            assert contrast(colours[text], colours["panel"]) >= 4.5
        for drawn in ("train", "held-out", "bar"):
            assert contrast(colours[drawn], colours["page"]) >= 3


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("loss", [5.0, float("nan"), float("inf")])
def test_runs_that_diverged_or_never_began_have_a_report(tmp_path: Path, run: RunReport, loss: float) -> None:
    bare = replace(run, sample=None, timelines={}, seconds=0.0, ranks=run.ranks[:1], axes={"tensor": 1})
    assert "No loss was recorded" in Page(write_report(tmp_path, bare)).text
    write_metrics(tmp_path, loss)
    page = Page(write_report(tmp_path, bare))
    assert "7.70 → 4.81" in page.text
    assert "on 1 rank" in page.text
    assert "Pipeline" not in page.text


def test_a_report_that_fails_leaves_the_old_one(
    tmp_path: Path, run: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metrics(tmp_path)
    before = write_report(tmp_path, run).read_bytes()
    with pytest.raises(UndefinedError):
        write_report(tmp_path, replace(run, axes={"elsewhere": 2}))
    monkeypatch.setattr("pathlib.Path.write_text", write_half_and_fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, replace(run, name="another"))
    assert (tmp_path / "report.html").read_bytes() == before


def write_half_and_fail(file: Path, text: str, encoding: str) -> None:
    file.write_bytes(text.encode(encoding)[: len(text) // 2])
    raise OSError("disk full")


def test_curve_is_an_svg_of_the_numbers_in_the_page_s_colours() -> None:
    metrics = [StepMetrics(step=step, loss=10.0 - step, held_out_loss=9.0 - step) for step in range(6)]
    svg = draw_loss_curve(metrics)
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib, "the page decides the size"
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg)
    lines = {colour: path_of(root, colour) for colour in ("var(--train)", "var(--held-out)")}
    for points in lines.values():
        steps, heights = zip(*points, strict=True)
        assert len(points) == 6
        assert len({round(b - a, 3) for a, b in pairwise(steps)}) == 1
        assert all(b > a for a, b in pairwise(heights)), "falling losses go down the page"
    assert all(a < b for (_, a), (_, b) in zip(*lines.values(), strict=True)), "held-out is drawn below train here"
    assert draw_loss_curve(metrics) == svg


def path_of(root: ElementTree.Element, colour: str) -> list[tuple[float, float]]:
    """The points of the line in `colour` that has most of them."""
    paths = [node.attrib["d"] for node in root.iter() if "d" in node.attrib and colour in node.attrib.get("style", "")]
    points = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in paths]
    return [(float(x), float(y)) for x, y in max(points, key=len)]


def test_long_runs_have_light_pages() -> None:
    assert len(draw_loss_curve([StepMetrics(step=step, loss=1 / (step + 1)) for step in range(30_000)])) < 60_000


def test_importing_the_report_loads_no_drawing_library() -> None:
    check = "print([name for name in ('matplotlib', 'jinja2', 'torch') if name in sys.modules])"
    code = f"import sys, weft.launch.report\n{check}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_memory_by_kind_stands_beside_its_formula(tmp_path: Path, run: RunReport) -> None:
    tracked = {"parameters": (2_362_368.0, 2_362_368.0), "activations": (34_100_000.0, 33_800_000.0)}
    ranks = [replace(rank, tracked=tracked) for rank in run.ranks]
    write_metrics(tmp_path)
    text = Page(write_report(tmp_path, replace(run, ranks=ranks))).text
    assert "Memory by kind" in text
    assert text.count("34.1 MB33.8 MB") == 4
    assert "Memory by kind" not in Page(write_report(tmp_path, run)).text
