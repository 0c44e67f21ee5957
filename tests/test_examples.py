"""The examples run by the commands in their docstrings, and print what these promise."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LARGEST = 60  # lines of code; an example is read whole


def commands(example: Path) -> list[str]:
    """The indented lines of an example's docstring."""
    text = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")), clean=False)
    assert text is not None
    return re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)


def run(command: str) -> str:
    """Run a command of an example at the repository's root; returns its output."""
    directory = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONUNBUFFERED"] = "1"
    finished = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_examples_are_short_and_say_how_to_run_them() -> None:
    assert len(EXAMPLES) >= 2
    for example in EXAMPLES:
        source = example.read_text(encoding="utf-8")
        code = source.splitlines()[ast.parse(source).body[0].end_lineno :]
        assert sum(bool(line.strip()) for line in code) <= LARGEST
        assert all(f"examples/{example.name}" in command for command in commands(example))


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_layer_equals_the_plain_one(ranks: int) -> None:
    output = run(commands(ROOT / "examples/own_layer.py")[ranks - 1])
    assert f"local weight=[{256 // ranks}, 64], ranks={ranks}" in output
    difference = re.search(r"difference from nn.Linear: (\S+)", output)
    assert difference is not None
    assert float(difference[1]) < 1e-6


def test_own_pipeline_shows_its_schedule_and_learns() -> None:
    (command,) = commands(ROOT / "examples/own_pipeline.py")
    output = run(command)
    assert "rank 3: 3F0 3B0 3F1 3B1" in output
    first, last = map(float, re.findall(r"loss (\S+)", output))
    assert last < first / 2
