"""`weft plan`: a ranked table, a settings file ready to train, JSON, and one sentence for nonsense."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weft.launch.cli import run
from weft.launch.settings import load_settings

DEMO = "configs/demo.yaml"


def test_table_names_the_best_and_why_others_lose(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", DEMO, "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert "layouts fit" in text
    assert "Why others lose" in text
    assert "the layout of the settings (data 1 · tensor 2 · pipeline 2 (1f1b) · microbatch 8)" in text


def test_the_timeline_of_the_best_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text("like: cpu\nmemory: 0.3125\n")
    assert run(["plan", DEMO, f"cluster.device={file}", "cluster.devices_per_node=4"]) == 0
    text = capsys.readouterr().out
    drawn = text[text.index("\nrank 0 F0") : text.index("\nWhy others lose")]
    assert re.search(r"\nrank 1 +F0.*B0", drawn)
    assert re.search(r"1f1b, \d+ of 32 microbatches, in seconds .* bubble", drawn)
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if "weft schedule" in line]
    assert run(line.partition("weft ")[2].split()) == 0
    assert "bubble" in capsys.readouterr().out


def test_json_holds_sizes_and_times_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", DEMO, "--top", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["layouts"]) == 2
    for layout in plan["layouts"]:
        for kind in ("memory_bytes", "step_seconds"):
            parts = dict(layout[kind])
            assert sum(parts.values()) == pytest.approx(2 * parts["total"])


def test_written_settings_load_back_with_the_best_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "best.yaml"
    arguments = ["plan", DEMO, "--json", "--top", "1", "--write", str(file)]
    assert run(arguments) == 0
    (best,) = json.loads(capsys.readouterr().out)["layouts"]
    settings = load_settings(file)
    assert settings.parallel.tensor == best["layout"]["tensor"]
    assert settings.parallel.zero == best["layout"]["zero"]
    assert settings.batch.micro_size == best["layout"]["micro_batch"]
    assert [path.name for path in tmp_path.iterdir()] == ["best.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([DEMO, "cluster.nodes=0", "cluster.device=h100-sxm"], ["cluster.nodes", "0"]),
        ([DEMO, "cluster.device=h100-sxn"], ["cluster.device", "h100-sxn", "h100-sxm"]),
        ([DEMO, "cluster.device=h100-sxm", "cluster.nodes=5"], ["global_size 32", "40 devices"]),
        ([DEMO, "model.num_key_value_heads=4"], ["heads"]),
        ([DEMO, "cluster.device=none.yaml"], ["none.yaml"]),
        ([], ["settings file"]),
        (["--validate", "none.csv"], ["none.csv"]),
    ],
)
def test_nonsense_gets_one_sentence(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("node: {bandwidth: -3}", ["node.bandwidth", "-3", "above 0"]),
        ("memmory: 80", ["memmory", "memory"]),
        ("peak_tflops: {bf16: 0}", ["peak_tflops"]),
        ("like: h10", ["h10"]),
    ],
)
def test_a_wrong_cluster_file_gets_one_sentence(
    line: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(line if line.startswith("like") else f"like: h100-sxm\n{line}\n")
    assert run(["plan", DEMO, f"cluster.device={file}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_model_that_fits_nowhere_names_the_nearest_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text("like: cpu\nmemory: 0.302\n")
    assert run(["plan", DEMO, f"cluster.device={file}"]) == 2
    error = capsys.readouterr().err
    assert "None of" in error
    assert "the nearest, data" in error
    assert "MiB more than there is" in error


def test_planning_imports_no_torch() -> None:
    code = f"import sys; from weft.launch.cli import run; run(['plan', '{DEMO}']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
