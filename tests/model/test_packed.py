"""Weights laid out for inference compute what they computed before, and are not held twice."""

from typing import Any

import pytest
import torch

from tests.model.test_cache import GEMMA3, GPT2, LLAMA, OLMO2
from tests.pool import Pool
from weft.model.config import model_config
from weft.model.decoder import initial_distribution
from weft.model.stage import build_stage
from weft.parallel import build_mesh, initialize
from weft.parallel.tensor.packed import PackedWeight, pack_weights

T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS = [QWEN2, GPT2, GEMMA3, OLMO2, T5]


def difference(settings: dict[str, Any], tensor: int, dtype: torch.dtype) -> float:
    """The largest between logits before and after."""
    mesh = build_mesh(tensor=tensor)["tensor"]
    config = model_config(settings)
    stage: Any = build_stage(config, range(config.num_hidden_layers), mesh=mesh, dtype=dtype).eval()
    initialize(stage, 3, initial_distribution(config))
    for name, parameter in stage.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = (tokens, None, tokens[:, :4]) if settings is T5 or config.kind != "decoder" else (tokens,)
    with torch.no_grad():
        before = stage(*inputs)
        pack_weights(stage, rows=8)
        after = stage(*inputs)
    padding = before.isinf()
    return float((before - after).masked_fill(padding, 0).abs().max() / before.masked_fill(padding, 0).abs().max())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("settings", MODELS, ids=[str(settings["model_type"]) for settings in MODELS])
def test_packed_models_compute_the_same(pool: Pool, settings: dict[str, Any], tensor: int) -> None:
    assert max(pool.run(tensor, difference, settings, tensor, torch.float64)) < 1e-14
    assert max(pool.run(tensor, difference, settings, tensor, torch.float32)) < 1e-5


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_are_held_once(rows: int) -> None:
    layers = [torch.nn.Linear(64, 48), torch.nn.Linear(64, 16, bias=False)]
    x = torch.randn(3, 64)
    expected = [layer(x) for layer in layers]
    packed = PackedWeight(layers, rows=rows)
    for found, wanted in zip(packed(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    kept = [layer.weight for layer in layers if not layer.weight.is_meta]
    if packed.is_blocked:
        assert not kept
    else:
        assert {weight.untyped_storage().data_ptr() for weight in kept} == {packed.weight.untyped_storage().data_ptr()}
        assert packed.weight.untyped_storage().nbytes() == 64 * 64 * 4
