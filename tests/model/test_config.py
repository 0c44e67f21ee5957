"""Configs: whatever the value of a key, it is taken or refused in a sentence that names the key."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from weft.model.config import ModelConfig, model_config
from weft.model.families import FAMILIES

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4}
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
ELSEWHERE = ["model_type", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "layer_types"]
ELSEWHERE += ["sliding_window", "sliding_window_pattern", "max_window_layers", "quantization_config"]
VALUES: list[Any] = [
    {}, {"a": 1}, {1: 2}, [], [[]], [{}], [{}, {}], (), "x", "", -1, 0, -2.5, True, False, 10**400, 1e300,
    float("nan"), float("inf"), {"full_attention": 3, "sliding_attention": "x"}, {"rope_type": []}, {"rope_type": {}},
]  # fmt: skip
SCALINGS: list[Any] = [
    {"rope_type": "linear", "factor": "x"},
    {"rope_type": "dynamic", "factor": [2]},
    {"rope_type": "yarn", "factor": {}},
    {"rope_type": "yarn", "factor": 2.0, "mscale": "x", "mscale_all_dim": 1},
    {"rope_type": "yarn", "factor": 2.0, "truncate": 3},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": []},
    {"rope_type": "longrope", "short_factor": "xx", "long_factor": [1.0]},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [[], {}]},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": [1], "original_max_position_embeddings": 0.5},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    {"rope_type": "default", "partial_rotary_factor": 1.5},
]


def base(model_type: str) -> dict[str, Any]:
    sizes = {"t5": T5, "gpt2": GPT2}.get(model_type, SMALL)
    family = FAMILIES[model_type]
    grouped = {"num_key_value_heads": 4} if "num_key_value_heads" in family.names else {}
    return {"model_type": model_type, **sizes, **grouped, **(WINDOW if family.windows else {})}


def outcomes(model_type: str, key: str, values: list[Any]) -> Iterator[str | ModelConfig]:
    for value in values:
        try:
            yield model_config({**base(model_type), key: value})
        except ValueError as error:
            yield str(error)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(model_type: str) -> None:
    keys = [*FAMILIES[model_type].names, *ELSEWHERE]
    for key in keys:
        for value, outcome in zip(VALUES, outcomes(model_type, key, VALUES), strict=True):
            if isinstance(outcome, str):
                assert outcome.startswith("model"), (key, value)
                assert len(outcome) < 500, (key, value)
                assert "\n" not in outcome, (key, value)
            else:
                wrong = [
                    known.name
                    for known in fields(ModelConfig)
                    if known.type in (bool, int) and type(getattr(outcome, known.name)) is not known.type
                ]
                assert not wrong, (key, value)


@pytest.mark.parametrize("key", list(SMALL))
def test_sizes_are_whole_numbers_that_fit(key: str) -> None:
    wrong = [{}, [], "x", -1, 0, 1.5, True, 10**400, float("nan")]
    for value, outcome in zip(wrong, outcomes("llama", key, wrong), strict=True):
        assert isinstance(outcome, str), value
        assert outcome.startswith(f"model.{key} is "), value


def test_layers_beyond_reason_are_refused_before_they_are_counted() -> None:
    assert "at most 100000" in str(next(outcomes("mistral", "num_hidden_layers", [10**9])))


def test_scalings_that_cannot_be_are_refused() -> None:
    for value, outcome in zip(SCALINGS, outcomes("llama", "rope_parameters", SCALINGS), strict=True):
        assert isinstance(outcome, str), value
        assert outcome.startswith("model.rope_parameters"), value


def test_a_key_that_is_no_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.1 is not a known key"):
        model_config(base("llama") | {1: 2})  # type: ignore[dict-item]
