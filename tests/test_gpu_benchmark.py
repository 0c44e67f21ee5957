"""The benchmark of one GPU runs end to end on a CPU, and its figures follow from one another by its formula."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_both_contenders_train_and_the_share_of_the_rate_is_by_the_formula() -> None:
    finished = call("--tiny", "--steps", "2")
    assert finished.returncode == 0, finished.stderr
    shown = finished.stdout
    factors = re.search(r"= 6·(\d+) \+ 12·(\d+)·(\d+)·(\d+) = (\S+);", shown)
    assert factors is not None
    matrices, layers, hidden, length = map(int, factors.groups()[:4])
    assert matrices == 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64 + 256 * 64
    flops = 6 * matrices + 12 * layers * hidden * length
    assert float(factors[5]) == pytest.approx(flops, rel=1e-5)
    rate = re.search(r"at (\S+) TFLOP/s", shown)
    lines = re.findall(r"^  (\w+) +(\S+) tokens/s +MFU +(\S+) .* loss (\S+) … (\S+)$", shown, re.MULTILINE)
    assert rate is not None
    assert [line[0] for line in lines] == ["weft", "transformers"]
    for _, speed, share, first, last in lines:
        assert float(share) == pytest.approx(float(speed) * flops / (1e12 * float(rate[1])), rel=2e-3)
        assert float(first) == pytest.approx(5.55, abs=0.1), "a new model's loss is about the logarithm of 256"
        assert float(last) < float(first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_does_run() -> None:
    finished = call()
    assert finished.returncode == 2
    assert finished.stderr.strip().endswith("this machine has no GPU; --tiny runs a small model on the CPU")
