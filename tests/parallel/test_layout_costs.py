"""The formulas of docs/layouts.md against the traffic of the engine itself, counted on gloo ranks."""

import importlib.util
import sys
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.pool import Pool
from weft.launch.engine import Engine
from weft.launch.settings import Settings, build_settings, load_settings, resolved
from weft.model.config import model_config
from weft.model.decoder import Block
from weft.parallel import AXES, build_mesh, count_traffic, defer_partial_gradients

ROOT = Path(__file__).parents[2]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tensor without sequence parallelism": {"tensor": 2, "sequence_parallel": False},
    "pipeline": {"pipeline": 2},
    "data": {"data": 2},
    "tensor with recomputation": {"tensor": 2, "recompute": "full"},
    "tensor of four": {"tensor": 4},
    "tensor of four without sequence parallelism": {"tensor": 4, "sequence_parallel": False},
    "pipeline of four, uneven": {"pipeline": 4, "split": [2, 1, 1, 0]},
    "tensor and pipeline": {"tensor": 2, "pipeline": 2},
    "tensor and pipeline without sequence parallelism, with recomputation": {
        "tensor": 2,
        "pipeline": 2,
        "sequence_parallel": False,
        "recompute": "full",
    },
    "data and pipeline": {"data": 2, "pipeline": 2},
    "data and tensor": {"data": 2, "tensor": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    # 97 tokens and one key-value head: padding and replicas wherever tensor is 2 or 4
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1},
    "tied llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "hidden_size": 32, "intermediate_size": 64},
}


def load_script() -> ModuleType:
    """docs/layout_costs.py, which is no part of a package."""
    specification = importlib.util.spec_from_file_location("layout_costs", ROOT / "docs/layout_costs.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["layout_costs"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


costs = load_script()


def settings_of(model: str, layout: str) -> Settings:
    sizes = {"vocab_size": 97, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 16}
    values = {
        "name": "costs",
        "model": sizes | MODELS[model],
        "parallel": {"data": 1} | LAYOUTS[layout],
        "batch": {"global_size": 12, "micro_size": 2},
        "corpus": {"sequence_length": 16},
    }
    return build_settings(values)


def count_steps(runs: list[Settings]) -> list[tuple[int, float, int]]:
    """One training step of each run, all of one layout: this rank's stage, the bytes it sent, its parameters."""
    parallel = runs[0].parallel
    assert parallel.data != "auto"
    mesh = build_mesh(pipeline=parallel.pipeline, data=parallel.data, tensor=parallel.tensor)
    return [count_step(settings, mesh) for settings in runs]


def count_step(settings: Settings, mesh: DeviceMesh) -> tuple[int, float, int]:
    config = model_config(settings.model)
    engine = Engine(config, settings, mesh)
    shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with count_traffic() as traffic:
        engine.step(0, tokens[:, :-1], tokens[:, 1:])
    return engine.stages[0].index, traffic.bytes, sum(parameter.numel() for parameter in engine.parameters)


def check_steps(pool: Pool, runs: list[Settings], ranks: int) -> None:
    for counted in pool.run(ranks, count_steps, runs):
        for settings, (stage, sent, parameters) in zip(runs, counted, strict=True):
            layout = costs.layout_of(settings, ranks)
            assert sent == pytest.approx(sum(costs.sent_bytes(layout, stage).values()), rel=1e-12), settings.model
            assert parameters == costs.parameters(layout, stage)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas_give_the_bytes_that_ranks_send_in_a_step(pool: Pool, layout: str) -> None:
    ranks = prod(size for axis, size in LAYOUTS[layout].items() if axis in AXES)
    check_steps(pool, [settings_of(model, layout) for model in MODELS], ranks)


@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=1", "parallel.pipeline=1", "parallel.data=2")])
def test_tables_of_the_page_are_those_of_the_demo_and_true(pool: Pool, overrides: tuple[str, ...]) -> None:
    settings = load_settings(ROOT / "configs/demo.yaml", overrides)
    ranks = 2 if overrides else 4
    assert costs.tables(costs.layout_of(settings, ranks)) in (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    check_steps(pool, [resolved(settings, ranks)], ranks)


def count_block(tensor: int, sequence_parallel: bool) -> list[tuple[int, float]]:
    """Operations and bytes of a block's forward and of its backward."""
    settings = settings_of("gpt2", "tensor")
    mesh = build_mesh(tensor=tensor)["tensor"]
    options: dict[str, Any] = {
        "mesh": mesh,
        "sequence_parallel": sequence_parallel,
        "dtype": torch.float32,
        "device": None,
    }
    config = model_config(settings.model | {"resid_pdrop": 0.0, "attn_pdrop": 0.0})
    block = Block(config, 0, **options)
    defer_partial_gradients(block)
    x = torch.randn(2, 16 // (tensor if sequence_parallel else 1), 32, requires_grad=True)
    with count_traffic() as forward:
        y = block(x, rotary=None)
    with count_traffic() as backward:
        y.sum().backward()
    return [(traffic.messages, traffic.bytes) for traffic in (forward, backward)]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_of_a_layer_are_those_of_the_page(pool: Pool, tensor: int, sequence_parallel: bool) -> None:
    activation = 2 * 16 * 32 * 4
    # as the page says: collectives and parts of `(tensor - 1) / tensor` of an activation, forward and backward
    expected = [(4, 4), (6, 6)] if sequence_parallel else [(2, 4), (2, 4)]
    pieces = tensor - 1 if sequence_parallel else min(tensor - 1, 1)  # sends of a direct exchange, one all-reduce
    for counted in pool.run(tensor, count_block, tensor, sequence_parallel):
        for (messages, sent), (collectives, parts) in zip(counted, expected, strict=True):
            assert messages == collectives * pieces
            assert sent == parts * (tensor - 1) / tensor * activation
