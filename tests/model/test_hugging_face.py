"""Models that transformers made, loaded from their directories: the same logits and gradients in every layout.

Each case is a directory with a tiny random model, its config and, by the same names, its gradients of one step.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.hugging_face import VOCABULARY, build
from tests.pool import Pool
from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.model.hugging_face import load_pretrained
from weft.parallel import build_mesh, gather
from weft.parallel.sharding import sharded_parameters

ROWS, SEQUENCE, TOLERANCE = 2, 20, 1e-5
# tensor, pipeline, and the cases by number: every family in every layout, its variants in turn
LAYOUTS = {
    (1, 1): slice(None),
    (2, 1): slice(0, 16),
    (4, 1): slice(0, 16, 2),
    (1, 2): slice(1, 16, 2),
    (2, 2): slice(0, None, 2),
}


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


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(3, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def make_reference(case: Case, directory: Path) -> Reference:
    model = build(case.model, torch.float32, **case.changes).eval()
    if case.model.startswith("gemma"):  # whose norms add 1 to their weights
        for name, parameter in model.named_parameters():
            parameter.data.sub_(1.0 if name.endswith("norm.weight") else 0.0)
    inputs, targets = tokens()
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    model.save_pretrained(directory / "model", max_shard_size="40KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory / "gradients")
    return Reference(case, str(directory / "model"), str(directory / "gradients"), logits.detach(), loss.item())


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return [make_reference(case, tmp_path_factory.mktemp(f"case{number}")) for number, case in enumerate(CASES)]


def settings_of(directory: str, tensor: int, pipeline: int, *, sequence_parallel: bool) -> Any:
    config = json.loads((Path(directory) / "config.json").read_text())
    return build_settings(
        {
            "name": "loaded",
            "model": config | {"pretrained": directory},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence_parallel": sequence_parallel},
            "batch": {"global_size": ROWS, "micro_size": 1},
            "train": {"optimizer": {"clip_grad_norm": 0.0}},
            "corpus": {"sequence_length": SEQUENCE},
        }
    )


def differences(references: list[Reference], tensor: int, pipeline: int) -> list[str]:
    """Everything in which this rank's logits, loss or gradients differ from the references', in words."""
    mesh = build_mesh(tensor=tensor, pipeline=pipeline)
    found = []
    for number, reference in enumerate(references):
        settings = settings_of(reference.directory, tensor, pipeline, sequence_parallel=number % 2 == 0)
        engine = Engine(model_config(settings.model), settings, mesh)
        errors = {"logits": logits_error(engine, reference), **step_errors(engine, reference)}
        found += [f"{reference.case}: {what} {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE]
    return found


def logits_error(engine: Engine, reference: Reference) -> float:
    for module in engine.modules:
        module.eval()
    with torch.no_grad():
        parts = engine.executor.forward(list(tokens()[0].chunk(ROWS)))
        if parts is None:
            return 0.0
        logits = gather(torch.cat(parts), engine.tensor, -1)[..., :VOCABULARY]  # type: ignore[arg-type]
    return float((logits - reference.logits).abs().max())


def step_errors(engine: Engine, reference: Reference) -> dict[str, float]:
    outcome = engine.step(0, *tokens())
    errors = {"loss": abs(outcome.loss - reference.loss)}
    for module in engine.modules:
        gradients = [parameter.grad for parameter in module.parameters()]
        load_pretrained(module, reference.gradients, engine.config)
        for (name, parameter, _), gradient in zip(sharded_parameters(module), gradients, strict=True):
            assert gradient is not None
            largest = max(1.0, float(parameter.detach().abs().max()))
            errors[f"gradient of {name}"] = float((gradient - parameter.detach()).abs().max()) / largest
    return errors


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(
    pool: Pool, references: list[Reference], tensor: int, pipeline: int
) -> None:
    chosen = references[LAYOUTS[tensor, pipeline]]
    results = pool.run(tensor * pipeline, differences, chosen, tensor, pipeline)
    assert not [found for result in results for found in result]
