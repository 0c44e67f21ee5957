"""Tokens computed one after the other with a cache have the logits that they have when all are computed at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pool import Pool
from weft.model.config import model_config
from weft.model.decoder import DecoderStage, initial_distribution
from weft.parallel import KeyValueCache, build_mesh, gather, initialize

VOCABULARY, CAPACITY = 40, 24
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": CAPACITY,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CAPACITY,
}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 8,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
}
OLMO2 = {**LLAMA, "model_type": "olmo2"}


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in (17, 9, 23)]


def largest_difference(settings: dict[str, Any], tensor: int) -> float:
    """Between logits with and without a cache, over prompts of different lengths whose tokens come in uneven pieces."""
    mesh = build_mesh(tensor=tensor)["tensor"]
    config = model_config(settings)
    stage = DecoderStage(config, range(2), mesh=mesh, dtype=torch.float64).eval()
    initialize(stage, 3, initial_distribution(config))
    attention = stage.layers["0"].self_attn
    cache = KeyValueCache(
        stage.layers,
        slots=4,
        capacity=CAPACITY,
        kv_heads=attention.local_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float64,
    )
    with torch.inference_mode():
        for tensors in (cache.keys, cache.values):
            for stored in tensors.values():
                stored.normal_()  # what an earlier sequence left in the slots
        differences = [
            pieces_against_whole(stage, cache, mesh, prompt, fresh) for prompt, fresh in ((5, True), (3, False))
        ]
    return max(differences)


def pieces_against_whole(stage: Any, cache: KeyValueCache, mesh: Any, prompt: int, fresh: bool) -> float:
    rows = sequences()
    whole = [gather(stage(row[None]), mesh, -1)[0, :, :VOCABULARY] for row in rows]
    found: list[list[Tensor]] = [[] for _ in rows]
    done = [0, 0, 0]
    for step in range(20):
        # rows that are through repeat their last token
        count = prompt if step == 0 else 1 + step % 2
        starts = [min(at, len(row) - count) for at, row in zip(done, rows, strict=True)]
        positions = torch.tensor(starts)[:, None] + torch.arange(count)
        tokens = torch.stack([row[start : start + count] for row, start in zip(rows, starts, strict=True)])
        view = cache.open(1, positions, int(positions.max()) + 1, fresh=fresh and step == 0)
        logits = gather(stage.logits(stage.hidden(tokens, cache=view)), mesh, -1)[..., :VOCABULARY]
        for number, start in enumerate(starts):
            found[number] += list(logits[number, done[number] - start :])
            done[number] = start + count
    pairs = [(torch.stack(mine), theirs) for mine, theirs in zip(found, whole, strict=True)]
    assert all(mine.shape == theirs.shape for mine, theirs in pairs)
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("settings", [LLAMA, GPT2, GEMMA3, OLMO2], ids=["llama", "gpt2", "gemma3", "olmo2"])
def test_logits_with_a_cache_are_those_without(pool: Pool, settings: dict[str, Any], tensor: int) -> None:
    assert max(pool.run(tensor, largest_difference, settings, tensor)) < 1e-12
