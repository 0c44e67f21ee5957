"""BERT and T5 learn the same in every layout: what is masked, dropped and handed on does not depend on it."""

from typing import Any

import pytest
import torch

from tests.pool import Pool
from weft.launch.engine import Engine
from weft.launch.objectives import IGNORED, content_key, prepare
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh

VOCABULARY, ROWS, SEQUENCE, STEPS = 61, 8, 16, 3
MODELS: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQUENCE,
        "mask_token_id": 3,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
    },
}
LAYOUTS: list[dict[str, Any]] = [
    {"data": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2, "recompute": "full", "offload": "activations"},
    {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "selective"},
    {"pipeline": 2, "schedule": "zb-v", "stages_per_rank": 2},
]


def windows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
    targets = rows[:, 1:].clone()
    targets[0, SEQUENCE - 4 :] = IGNORED
    return rows[:, :-1], targets


def train(model: dict[str, Any], parallel: dict[str, Any]) -> list[float]:
    """Losses, gradient norms and the held-out loss of a few steps."""
    sizes = {axis: parallel.get(axis, 1) for axis in ("data", "tensor", "pipeline")}
    settings = build_settings(
        {
            "name": "encoders",
            "model": model | {"vocab_size": VOCABULARY},
            "parallel": {"sequence_parallel": False} | parallel | sizes,
            "batch": {"global_size": ROWS, "micro_size": 2},
            "corpus": {"sequence_length": SEQUENCE},
        }
    )
    mesh = build_mesh(**sizes)
    engine = Engine(model_config(settings.model), settings, mesh, dtype=torch.float64)
    share, replica = ROWS // sizes["data"], mesh["data"].get_local_rank()
    rows = slice(replica * share, (replica + 1) * share)
    found = []
    for step in range(STEPS):
        inputs, targets = windows(step)
        outcome = engine.step(step, inputs[rows], targets[rows])
        found += [outcome.loss, outcome.gradient_norm]
    inputs, targets = windows(STEPS)
    return [*found, *engine.evaluate(inputs[rows], targets[rows])]


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_does_not_change_what_is_learned(pool: Pool, name: str) -> None:
    (expected,) = pool.run(1, train, MODELS[name], {}, timeout=200)
    for layout in LAYOUTS:
        ranks = layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)
        for found in pool.run(ranks, train, MODELS[name], layout, timeout=200):
            assert found == pytest.approx(expected, abs=1e-10), layout


def test_masked_tokens_are_to_be_found_and_the_others_are_not() -> None:
    config = model_config(MODELS["bert"] | {"vocab_size": VOCABULARY})
    tokens = torch.randint(4, VOCABULARY, (400, SEQUENCE))
    (shown, valid), targets = prepare(config, tokens, tokens.roll(-1, 1), content_key(tokens))
    chosen = targets != IGNORED
    assert valid.all()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(shown[~chosen], tokens[~chosen])
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (shown[chosen] == 3).double().mean().item() == pytest.approx(0.8, abs=0.05)


def test_an_encoder_without_a_mask_token_says_what_it_needs() -> None:
    config = model_config(MODELS["bert"] | {"vocab_size": VOCABULARY, "mask_token_id": None})
    with pytest.raises(ValueError, match="mask_token_id"):
        prepare(config, *windows(0), content_key(windows(0)[0]))


def test_the_decoder_goes_on_where_the_encoder_ends() -> None:
    config = model_config(MODELS["t5"] | {"vocab_size": VOCABULARY})
    rows = torch.arange(1, SEQUENCE + 2)[None]
    (text, valid, answer), targets = prepare(config, rows[:, :-1], rows[:, 1:], content_key(rows[:, :-1]))
    assert torch.cat((text, targets), 1).tolist() == rows[:, :-1].tolist()
    assert answer.tolist() == [[0, *targets[0, :-1].tolist()]]
    assert valid.all()
