"""Seconds of matrix products and of stages, against published measurements that nothing was fitted to."""

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from tests.launch.plan.shapes import gpt
from weft.launch.plan.block import Model, block_time
from weft.launch.plan.cluster import load_cluster
from weft.launch.plan.kernels import product_time
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import MEGATRON

MEASURED = Path(__file__).parents[3] / "../shared/data/gemm_efficiency_measured.csv"


def test_products_are_as_long_as_measured() -> None:
    """Forwards, input gradients (m is tokens) and weight gradients (k is tokens) on an A100 and a B200."""
    if not MEASURED.exists():
        pytest.skip("the table of measured products is not here")
    errors = defaultdict(list)
    with MEASURED.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] == "matmul" and row["m"]:
                cluster = load_cluster("b200" if row["gpu"] == "B200" else "a100-80gb")
                m, k, n = (float(row[name]) for name in ("m", "k", "n"))
                seconds = 2 * m * k * n / (float(row["efficiency_of_peak"]) * float(row["peak_tflops"]) * 1e12)
                predicted = product_time(cluster, "bf16", m, k, n, 2).forward
                errors[row["gpu"]].append(abs(predicted / seconds - 1))
    assert len(errors["B200"]) > 400
    assert mean(errors["A100-PCIe"]) < 0.06
    assert mean(errors["B200"]) < 0.14


def test_small_results_leave_multiprocessors_idle() -> None:
    """The same arithmetic takes longer the smaller the result; half a round of 108 tiles of 128 × 128 each time."""
    cluster = load_cluster("a100-80gb").model_copy(update={"kernel_latency": 0.0})
    rate = cluster.peak("bf16") * cluster.gemm_efficiency
    short, long = (product_time(cluster, "bf16", tokens, 8192, 8192, 2) for tokens in (2048, 16384))
    round_of_tiles = 2 * 128 * 128 * 8192 * 108 / rate
    for time, tokens in ((short, 2048), (long, 16384)):
        assert time.forward == pytest.approx(2 * tokens * 8192**2 / rate + 0.5 * round_of_tiles)
    assert short.weight_gradient == pytest.approx(short.forward, rel=0.1)
    assert short.weight_gradient < short.forward


# Qi et al. 2023, tables 4 and 9: layers of a stage, hidden, heads, sequences of 1024, milliseconds of F, B and W
STAGES = [
    (3, 2304, 24, 6, 18.522, 18.086, 9.337),
    (4, 4096, 32, 3, 29.718, 29.444, 19.927),
    (3, 5120, 40, 1, 11.347, 11.248, 8.132),
    (2, 6144, 48, 1, 10.419, 10.207, 7.715),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"hidden {stage[1]}")
def test_passes_of_a_stage_are_as_long_as_measured(stage: tuple[float, ...]) -> None:
    layers, hidden, heads, sequences, *measured = stage
    recipe = replace(MEGATRON, precision="fp16", attention="plain")
    shape, layout = gpt(int(layers), int(hidden), int(heads)), Layout(micro_batch=int(sequences))
    block = block_time(Model(shape, Job(int(sequences), 1024), layout, recipe, load_cluster("a100-80gb")))
    passes = [1e3 * layers * seconds for seconds in (block.forward, block.input_gradient, block.weight_gradient)]
    assert sum(passes) == pytest.approx(sum(measured), rel=0.04)
    assert passes == pytest.approx(measured, rel=0.16)
