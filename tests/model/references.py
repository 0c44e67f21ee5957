"""Tiny random models that transformers made: their directories, and what transformers computes with them.

Each case is a directory with a model and its config and, by the same names, one with its gradients of one step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.hugging_face import VOCABULARY, build

ROWS, SEQUENCE, ANSWER = 2, 20, 12


@dataclass(frozen=True)
class Case:
    """A model of `tests.parallel.hugging_face`, with some of its config's values changed."""

    model: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.model, *(f"{key}={value}" for key, value in self.changes.items())])


def rotary(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


CASES = [
    Case("bert"),
    Case("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    Case("bert", {"type_vocab_size": 1, "hidden_act": "gelu_new"}),
    Case(
        "t5", {"tie_word_embeddings": False, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    ),
    Case("llama", {"num_key_value_heads": 1}),
    Case("llama-tied", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    Case("mistral"),
    Case(
        "qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    ),
    Case("qwen3", {"num_key_value_heads": 1}),
    Case("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True}),
    Case("gemma3", {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    Case("gemma3", {"num_key_value_heads": 1, "tie_word_embeddings": False, **rotary("default")}),
    Case("phi3", {"num_key_value_heads": 1, "sliding_window": 6}),
    Case("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case("gpt2"),
    Case("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    Case("gpt-neox"),
    Case("gpt-neox", {"tie_word_embeddings": True, "use_parallel_residual": False, "attention_bias": False}),
    Case("olmo2", {"num_key_value_heads": 1}),
    Case("olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("llama", rotary("linear", factor=2.5)),
    Case("llama", {"max_position_embeddings": 12, **rotary("dynamic", factor=2.0)}),
    Case("llama", rotary("yarn", factor=4.0, original_max_position_embeddings=16)),
    Case("qwen2", rotary("yarn", factor=8.0, original_max_position_embeddings=8, truncate=False, beta_fast=4.0)),
    Case(
        "llama",
        rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    *(
        Case(
            "phi3",
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": length,
                **rotary("longrope", short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 3.0, 4.0]),
            },
        )
        for length in (16, 32)
    ),
]


@dataclass(frozen=True)
class Reference:
    """What transformers makes of a case; `gradients` is a directory like the model's."""

    case: Case
    directory: str
    gradients: str
    logits: Tensor
    loss: float

    @property
    def inputs(self) -> Any:
        """What the first stage of the pipeline takes."""
        given = inputs_of(self.case)
        order = [given[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in given]
        return tuple(order) if len(order) > 1 else order[0]

    @property
    def targets(self) -> Tensor:
        return targets_of(self.case)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(3, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def inputs_of(case: Case) -> dict[str, Tensor]:
    """By transformers' names; encoders have padding at the end of one row."""
    inputs, answers = tokens()
    if case.model not in ("bert", "t5"):
        return {"input_ids": inputs}
    mask = torch.ones_like(inputs)
    mask[1, 13:] = 0
    decoder = {"decoder_input_ids": answers[:, :ANSWER]} if case.model == "t5" else {}
    return {"input_ids": inputs, "attention_mask": mask} | decoder


def targets_of(case: Case) -> Tensor:
    _, answers = tokens()
    if case.model == "t5":
        return answers[:, 1 : ANSWER + 1]
    return answers.masked_fill(inputs_of(case)["attention_mask"] == 0, -100) if case.model == "bert" else answers


def make_reference(case: Case, directory: Path) -> Reference:
    model = build(case.model, torch.float32, **case.changes).eval()
    if case.model.startswith("gemma"):  # whose norms add 1 to their weights
        for name, parameter in model.named_parameters():
            parameter.data.sub_(1.0 if name.endswith("norm.weight") else 0.0)
    targets = targets_of(case)
    cached = {} if case.model == "bert" else {"use_cache": False}
    logits = model(**inputs_of(case), **cached).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    model.save_pretrained(directory / "model", max_shard_size="40KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory / "gradients")
    return Reference(case, str(directory / "model"), str(directory / "gradients"), logits.detach(), loss.item())
