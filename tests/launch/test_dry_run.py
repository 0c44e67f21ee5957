"""A dry run against real ranks: the same operations and bytes over every axis, the same memory, in every layout."""

import re
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.dry_run import Exchange, dry_run, exchanges_of
from weft.launch.engine import Engine
from weft.launch.measured import measured_step
from weft.launch.plan.breakdown import Memory
from weft.launch.settings import Settings, build_settings, resolved
from weft.model.config import model_config
from weft.parallel import AXES, build_mesh, count_traffic, track_memory

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 16}
TIED = LLAMA | {"tie_word_embeddings": True}
GPT2: dict[str, Any] = {"model_type": "gpt2", "max_position_embeddings": 16}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": ({}, LLAMA),
    "one rank with dropout": ({}, GPT2),
    "tensor": ({"tensor": 2}, LLAMA),
    "tensor without sequence parallelism, selective": (
        {"tensor": 2, "sequence_parallel": False, "recompute": "selective"},
        LLAMA,
    ),
    "tensor of four with dropout": ({"tensor": 4}, GPT2),
    "data": ({"data": 2}, TIED),
    "pipeline, tied": ({"pipeline": 2}, TIED),
    "gpipe": ({"pipeline": 2, "schedule": "gpipe"}, LLAMA),
    "interleaved, recomputed": (
        {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2, "recompute": "full"},
        LLAMA,
    ),
    "zb-h1, tied": ({"pipeline": 2, "schedule": "zb-h1"}, TIED),
    "zb-v and tensor": ({"pipeline": 2, "tensor": 2, "schedule": "zb-v"}, LLAMA),
    "data and pipeline": ({"data": 2, "pipeline": 2}, LLAMA),
    "data and tensor, recomputed": ({"data": 2, "tensor": 2, "recompute": "full"}, LLAMA),
}


def settings_of(layout: str) -> Settings:
    parallel, model = LAYOUTS[layout]
    sizes = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    values = {
        "name": "dry",
        "model": model | sizes | {"num_attention_heads": 4},
        "parallel": {"data": 1} | parallel,
        "batch": {"global_size": 8, "micro_size": 2},
        "corpus": {"sequence_length": 16},
        "cluster": {"device": "cpu"},
    }
    ranks = prod(size for axis, size in parallel.items() if axis in AXES)
    return resolved(build_settings(values), ranks)


def sizes_of(settings: Settings) -> dict[str, int]:
    return {axis: getattr(settings.parallel, axis) for axis in AXES}


def really_run(settings: Settings) -> tuple[tuple[Exchange, ...], Memory]:
    """What this rank exchanges in a step and what it holds."""
    mesh = build_mesh(**sizes_of(settings))
    engine = Engine(model_config(settings.model), settings, mesh)
    shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length)
    tokens = torch.randint(98, shape, generator=torch.Generator().manual_seed(0))
    with count_traffic() as traffic:
        _, memory = measured_step(engine, 0, tokens, tokens)
    return exchanges_of(traffic.calls, mesh), memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dry_run_sends_and_holds_to_the_byte_what_every_real_rank_does(pool: Pool, layout: str) -> None:
    settings = settings_of(layout)
    ranks = prod(sizes_of(settings).values())
    for rank, (exchanges, memory) in enumerate(pool.run(ranks, really_run, settings)):
        dry = dry_run(settings, ranks, rank)
        assert dry.exchanges == exchanges
        assert dry.memory == memory
        assert min(memory.parameters, memory.gradients, memory.optimizer, memory.activations) > 0


def test_tracked_activations_are_those_that_the_allocator_would_have_to_hold() -> None:
    """Of operations whose results are known: what is kept for the backward, and what lives for a moment only."""
    x, weight = torch.randn(10, 100), torch.randn(100, 100, requires_grad=True)
    with track_memory() as memory:
        y = x @ weight  # 4,000 bytes
        loss = (y.view(-1) * 2).relu().sum()  # 4,000 for a moment, 4,000 kept, 4
        assert (memory.live, memory.peak) == (8004, 12000)
        del y
        assert memory.live == 4004
        loss.backward()
        del loss
    assert memory.live == 40_000  # the gradient
    assert memory.peak >= 44_000


LARGE = [
    "model={model_type: llama, vocab_size: 128256, hidden_size: 16384, intermediate_size: 53248, "
    "num_hidden_layers: 126, num_attention_heads: 128, num_key_value_heads: 8, max_position_embeddings: 8192}",
    "parallel.tensor=8",
    "parallel.pipeline=16",
    "batch={global_size: 2048, micro_size: 1}",
    "corpus.sequence_length=8192",
    "cluster={nodes: 2048, devices_per_node: 8, device: h100-sxm}",
]


def test_rank_of_a_405b_model_on_16384_gpus_takes_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert run(["train", str(ROOT / "configs/demo.yaml"), *LARGE, "--dry-run", "--rank", "16383"]) == 0
    assert time.process_time() - start < 10
    shown = capsys.readouterr().out
    assert "rank 16383 of 16,384: pipeline 15, data 127, context 0, tensor 7" in shown
    assert "stage 15: layers 119 to 125; 3,052,126,208 parameters" in shown
    # gradients of the rank's parameters in float32, averaged by a ring of 128, and two numbers of 8 bytes
    sent = 2 * 127 / 128 * (4 * 3_052_126_208 + 16)
    assert re.search(rf"data +all_reduce .* {sent / 1e9:.1f} GB", shown)


def test_rank_outside_the_world_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(ROOT / "configs/demo.yaml"), "--dry-run", "--rank", "4"]) == 2
    assert capsys.readouterr().err.strip() == "--rank is 4, but the world has the ranks 0 to 3; choose one of them."
