"""The page on `weft verify` tells the truth: its commands run, and its models give what it says."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.test_docs import VERIFY, blocks, commands, named_files, small_demo, text_of
from weft.launch.verify.causes import Kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    for name, code in named_files(VERIFY).items():
        (path / name).write_text(code, encoding="utf-8")
    demo = small_demo()
    # too few layers for schedules with two stages per rank, too few heads for most tensor sizes
    demo["model"] |= {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3}
    (path / "configs").mkdir()
    (path / "configs/demo.yaml").write_text(yaml.safe_dump(demo), encoding="utf-8")
    return path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "weft"
    arguments = [sys.executable, "-m", *words]
    return subprocess.run(arguments, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("command", commands(VERIFY))
def test_commands_run_and_find_everything_right(command: str, folder: Path) -> None:
    if "llama" in command and find_spec("transformers") is None:
        pytest.skip("the extra huggingface is not installed")
    finished = run(command, folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "layouts give what one process gives" in finished.stdout


def test_the_wrong_model_is_told_as_the_page_says(folder: Path) -> None:
    finished = run("weft verify --model my_wrong_model:build --processes 2", folder)
    assert finished.returncode == 1
    told = " ".join(finished.stdout.split())
    (said,) = [block for block in blocks(VERIFY, "text") if block.startswith("First wrong")]
    for line in filter(None, said.splitlines()):
        assert line in told


def test_every_cause_is_on_the_page() -> None:
    for kind in Kind:
        assert str(kind) in text_of(VERIFY)
