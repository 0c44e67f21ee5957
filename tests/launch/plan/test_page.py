"""The page of a plan: whole by itself, and with the numbers of the plan."""

import re
from pathlib import Path

import pytest

from weft.launch.cli import run

ROOT = Path(__file__).parents[3]
GPUS = ["cluster.device=h100-sxm", "cluster.nodes=2", "cluster.devices_per_node=8"]


def test_page_needs_nothing_else_and_has_the_numbers_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.html"
    assert run(["plan", str(ROOT / "configs/demo.yaml"), *GPUS, "--top", "3", "--html", str(path)]) == 0
    page, shown = path.read_text(encoding="utf-8"), capsys.readouterr().out
    assert not re.search(r"(src|href)=\"(?!#)", page.replace('xlink:href="#', 'xlink:href="#'))
    assert page.count("<svg") >= 3
    best = next(line for line in shown.splitlines() if line.startswith("1 "))
    label = best.split("  ")[-1].strip()
    assert label in page
    assert shown.split(" layouts fit")[0].rpartition(": ")[2] + " layouts fit" in page.replace(",", "")
    identifiers = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]


def test_page_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "missing/plan.html"
    assert run(["plan", str(ROOT / "configs/demo.yaml"), *GPUS, "--html", str(path)]) == 2
    error = f"--html {path} cannot be written (No such file or directory); choose another path."
    assert capsys.readouterr().err.strip() == error


def test_page_shows_the_layout_to_take_and_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, path = tmp_path / "tiny.yaml", tmp_path / "plan.html"
    cluster.write_text("like: cpu\nmemory: 0.3125\n")
    own = [f"cluster.device={cluster}", "cluster.devices_per_node=4"]
    assert run(["plan", str(ROOT / "configs/demo.yaml"), *own, "--html", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    (row,) = re.findall(r"<tr><td class=\"number\">\d+ \*</td>.*</tr>", page)
    label = next(line for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ \*", line)).split("  ")[-1]
    assert label.strip() in row
    assert "The pipeline of the best layout" in page
    assert "of 32 microbatches, in seconds" in page
