"""Models that transformers made, loaded from their directories: the same logits and gradients in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.references import ROWS, SEQUENCE, Reference
from tests.parallel.hugging_face import VOCABULARY
from tests.pool import Pool
from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.model.hugging_face import load_pretrained
from weft.parallel import build_mesh, gather
from weft.parallel.sharding import sharded_parameters

TOLERANCE = 1e-5
# tensor, pipeline, and the cases by number: every family in every layout, its variants in turn
LAYOUTS = {
    (1, 1): slice(None),
    (2, 1): slice(0, 20),
    (4, 1): slice(0, 20, 2),
    (1, 2): slice(1, 20, 2),
    (2, 2): slice(0, None, 2),
}


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
    with torch.no_grad():
        parts = engine.outputs(reference.inputs, reference.targets)
        if parts is None:
            return 0.0
        logits = gather(torch.cat(parts), engine.tensor, -1)[..., :VOCABULARY]
    counted = reference.targets != -100  # what stands for padding says nothing
    return float((logits - reference.logits)[counted].abs().max())


def step_errors(engine: Engine, reference: Reference) -> dict[str, float]:
    outcome = engine.step(0, reference.inputs, reference.targets)
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
    results = pool.run(tensor * pipeline, differences, chosen, tensor, pipeline, timeout=200)
    assert not [found for result in results for found in result]
