"""The examples of tensor parallelism, by the commands in their docstrings: equal numbers on any number of ranks."""

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ["own_gpt", "hugging_face_llama", "with_fsdp2", "with_ddp"]


def lines(example: str) -> list[str]:
    """The indented lines of the docstring: commands."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text())) or ""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def commands(example: str) -> list[list[str]]:
    """The commands of the docstring, to be run by this Python."""
    parts = [shlex.split(line, comments=True) for line in lines(example)]
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [[*launchers[line[0]], *(["--standalone"] if line[0] == "torchrun" else []), *line[1:]] for line in parts]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_the_same_losses_on_any_number_of_ranks(example: str) -> None:
    if example == "hugging_face_llama" and find_spec("transformers") is None:
        pytest.skip("the extra huggingface is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    seen = []
    for command in commands(example):
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        seen.append(re.findall(r"loss .*", run.stdout))
    assert len(seen) == 2, "one command for one process, one for several"
    assert seen[0], "no loss was printed"
    assert seen[0] == seen[1]
    losses = [float(line.split()[1].rstrip(",")) for line in seen[0]]
    assert losses == sorted(losses, reverse=True), "training brings the loss down"
