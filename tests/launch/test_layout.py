"""Layouts that do not fit: each gets one sentence with the numbers, the rule and the choices."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.launch.errors import UserError
from weft.launch.layout import check_layout, data_size, microbatches
from weft.launch.settings import Settings, build_settings

MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def settings(**sections: Any) -> Settings:
    corpus = {"sequence_length": 32} | sections.pop("corpus", {})
    return build_settings({"name": "t", "model": MODEL | sections.pop("model", {}), "corpus": corpus, **sections})


@given(*[st.integers(1, 6)] * 5)
def test_layouts_that_divide_are_taken(pipeline: int, data: int, tensor: int, micro: int, count: int) -> None:
    fitting = settings(
        parallel={"pipeline": pipeline, "tensor": tensor},
        batch={"global_size": data * micro * count, "micro_size": micro},
    )
    world = pipeline * data * tensor
    assert data_size(fitting, world) == data
    assert microbatches(fitting, world) == count


@pytest.mark.parametrize(
    ("sections", "world"),
    [
        ({}, 1),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 4),
        ({"parallel": {"tensor": 2, "pipeline": 2, "data": 2, "schedule": "gpipe"}}, 8),
        ({"parallel": {"pipeline": 2, "split": [3, 1]}}, 2),
        ({"parallel": {"tensor": 2, "sequence_parallel": False}, "corpus": {"sequence_length": 31}}, 2),
    ],
)
def test_fitting_layouts_pass(sections: dict[str, Any], world: int) -> None:
    check_layout(settings(**sections), world)


@pytest.mark.parametrize(
    ("sections", "world", "words"),
    [
        ({"parallel": {"tensor": 3}}, 4, ["tensor 3", "does not divide the world of 4 ranks", "1, 2 or 4"]),
        ({"parallel": {"tensor": 2, "data": 3}}, 8, ["parallel.data is 3", "4 replicas", "=4 or auto", "6 ranks"]),
        ({"parallel": {"tensor": 4, "pipeline": 2}}, 4, ["is 8", "world of 4", "choose tensor 1 or 2"]),
        ({"parallel": {"pipeline": 5}}, 4, ["is 5", "world of 4", "choose sizes whose product does"]),
        ({"batch": {"global_size": 30, "micro_size": 4}}, 2, ["global_size is 30", "data 2 ×", "= 8", "24 or 32"]),
        ({"batch": {"global_size": 10**15}}, 1, ["global_size is 10", "at most 100000", "larger batch.micro_size"]),
        ({"batch": {"global_size": 3, "micro_size": 4}}, 1, ["global_size is 3", "that do: 4"]),
        ({"batch": {"initial_size": 12}}, 1, ["initial_size is 12", "does not divide batch.global_size 32"]),
        ({"batch": {"initial_size": 4}}, 2, ["initial_size is 4", "= 8", "choose a multiple of 8"]),
        ({"parallel": {"tensor": 4}}, 4, ["parallel.tensor is 4", "6 attention heads", "choose 1, 2"]),
        ({"model": {"intermediate_size": 97}, "parallel": {"tensor": 2}}, 2, ["intermediate_size 97", "tensor 2"]),
        ({"model": {"hidden_sise": 3}}, 1, ["model.hidden_sise is not a known key", "hidden_size"]),
        ({"corpus": {"sequence_length": 64}}, 1, ["sequence_length is 64", "32 positions"]),
        ({"corpus": {"sequence_length": 31}, "parallel": {"tensor": 2}}, 2, ["is 31", "tensor 2", "choose 30"]),
        ({"parallel": {"pipeline": 5}}, 5, ["parallel.pipeline is 5", "4 layers", "at most 4"]),
        ({"parallel": {"pipeline": 2, "split": [2, 1]}}, 2, ["parallel.split [2, 1]", "3 layers", "has 4"]),
        ({"parallel": {"pipeline": 2, "split": [4]}}, 2, ["parallel.split [4]", "2 stages"]),
        ({"parallel": {"schedule": "1f1c"}}, 1, ["parallel.schedule is 1f1c", "did you mean 1f1b?"]),
        ({"parallel": {"schedule": "mine.csv"}}, 1, ["parallel.schedule is mine.csv", "cannot be read"]),
        ({"parallel": {"schedule": "gpipe", "stages_per_rank": 2}}, 1, ["gpipe", "one stage per rank, not 2"]),
        ({"parallel": {"context": 2}}, 2, ["parallel.context is 2; this version supports 1"]),
        ({"parallel": {"zero": 1, "zero_engine": "fsdp2"}}, 1, ["zero_engine is fsdp2", "zero=3", "deepspeed or auto"]),
        ({"parallel": {"zero": 3, "zero_engine": "deepspeed", "pipeline": 2}}, 2, ["zero is 3", "fsdp2", "zero=2"]),
        ({"parallel": {"zero": 3, "offload": "optimizer", "schedule": "zb-v", "stages_per_rank": 2}}, 1, ["2 stages"]),
        ({"parallel": {"offload": "optimizer"}}, 1, ["parallel.zero is 0", "zero=1", "offload=none"]),
        ({"parallel": {"offload": "optimizer", "zero": 3, "zero_engine": "fsdp2"}}, 1, ["engine fsdp2", "=auto"]),
        ({"parallel": {"tensor": 2}, "train": {"optimizer": {"name": "adafactor"}}}, 2, ["adafactor", "adamw or sgd"]),
        ({"parallel": {"zero": 1}, "train": {"optimizer": {"name": "muon"}}}, 2, ["muon", "zero is 1", "zero=0"]),
    ],
)
def test_misfits_name_numbers_and_choices(sections: dict[str, Any], world: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(settings(**sections), world)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not message.endswith("..")
