"""Memory under ZeRO: what is said before anything runs, beside what DeepSpeed and FSDP2 take on real ranks."""

from math import prod
from typing import Any

import pytest
import torch

from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.dry_run import dry_run
from weft.launch.engine import Engine
from weft.launch.ledger import formula
from weft.launch.measured import measured_step
from weft.launch.plan.breakdown import Memory
from weft.launch.settings import Settings, build_settings, resolved
from weft.model.config import model_config
from weft.parallel import AXES, build_mesh

MODEL = {"model_type": "llama", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
LAYOUTS: list[dict[str, Any]] = [
    {"data": 2, "zero": 1},
    {"data": 2, "zero": 2},
    {"data": 2, "zero": 3},
    {"data": 2, "zero": 3, "zero_engine": "deepspeed"},
    {"data": 3, "zero": 1, "precision": "bf16"},
    {"data": 3, "zero": 3, "precision": "bf16"},
    {"data": 2, "tensor": 2, "zero": 2, "precision": "bf16"},
    {"data": 2, "tensor": 2, "zero": 3, "zero_engine": "deepspeed", "precision": "bf16"},
    {"data": 2, "pipeline": 2, "zero": 1},
    {"data": 2, "pipeline": 2, "zero": 2, "schedule": "zb-h1"},
    {"data": 2, "pipeline": 2, "zero": 3, "schedule": "interleaved", "stages_per_rank": 2},
    {"data": 2, "pipeline": 2, "zero": 3, "precision": "bf16"},
]


def settings_of(layout: dict[str, Any]) -> Settings:
    parallel = {key: value for key, value in layout.items() if key != "precision"}
    values = {
        "name": "divided",
        "model": MODEL | {"num_attention_heads": 4, "max_position_embeddings": 32},
        "parallel": parallel,
        "batch": {"global_size": 12, "micro_size": 1},
        "train": {"precision": layout.get("precision", "fp32")},
        "corpus": {"sequence_length": 32},
        "cluster": {"device": "cpu"},
    }
    return resolved(build_settings(values), prod(layout.get(axis, 1) for axis in AXES))


def really_held(layouts: list[dict[str, Any]]) -> list[Memory]:
    """What this rank holds in each of some layouts of as many ranks."""
    found = []
    for settings in map(settings_of, layouts):
        mesh = build_mesh(**{axis: getattr(settings.parallel, axis) for axis in AXES})
        engine = Engine(model_config(settings.model), settings, mesh)
        tokens = torch.zeros(settings.batch.global_size // mesh["data"].size(), 32, dtype=torch.int64)
        found.append(measured_step(engine, 0, tokens, tokens)[1])
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_states_are_what_is_said_before(pool: Pool, ranks: int) -> None:
    layouts = [layout for layout in LAYOUTS if prod(layout.get(axis, 1) for axis in AXES) == ranks]
    every = pool.run(ranks, really_held, layouts, timeout=120)
    for number, layout in enumerate(layouts):
        settings = settings_of(layout)
        for rank in {0, ranks - 1}:
            pipeline_rank = rank * settings.parallel.pipeline // ranks
            held = every[rank][number]
            for said in (dry_run(settings, ranks, rank).memory, formula(settings, pipeline_rank)):
                for kind in ("parameters", "gradients", "optimizer"):
                    assert getattr(said, kind) == pytest.approx(getattr(held, kind), rel=0.05), (layout, rank, kind)


def test_dry_run_of_a_large_model_divides(capsys: pytest.CaptureFixture[str]) -> None:
    """A 7 B model on 8 data ranks: 2 bytes of weights, 4 of gradients and 12 of optimiser by 8 for each parameter."""
    model = (
        "{model_type: llama, vocab_size: 32000, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, "
    )
    sizes = [f"model={model}num_attention_heads: 32, max_position_embeddings: 4096}}", "train.precision=bf16"]
    layout = ["parallel={data: 8, zero: 1}", "cluster={device: h100-sxm, devices_per_node: 8}", "batch.global_size=64"]
    assert run(["train", "configs/demo.yaml", *sizes, *layout, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    parameters = 6_738_415_616
    for kind, each in {"parameters": 2, "gradients": 4, "optimizer": 12 / 8}.items():
        assert f"  {kind:<12}{each * parameters / 1e9:>7.1f} GB" in shown
