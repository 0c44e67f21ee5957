"""Where the CPU waits for the device in a step: for what is logged, and for nothing else.

On the meta device, which has no numbers, whoever looks at one is seen.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from weft.launch.engine import Engine
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh, without_numbers

aten = torch.ops.aten
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SCALED = {"rope_type": "dynamic", "factor": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "max_position_embeddings": 16},
    "llama, dynamic rotary": {"model_type": "llama", "max_position_embeddings": 16, "rope_scaling": SCALED},
    "gemma 3, scaled embedding": {"model_type": "gemma3_text", "head_dim": 8, "max_position_embeddings": 16},
    "gpt2, dropout": {"model_type": "gpt2", "max_position_embeddings": 16},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "data and tensor": {"data": 2, "tensor": 2},
    "pipeline, zb-h1, recomputed": {"pipeline": 2, "schedule": "zb-h1", "recompute": "full"},
}


class Waits(TorchDispatchMode):
    """Notes each look at a number of the device, and each copy to it or from it for which the CPU waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.seen.append("number")
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta and not any(args[2:]):
            self.seen.append("copy")
        if func is aten._to_copy.default and kwargs.get("device") is not None and not kwargs.get("non_blocking"):
            self.seen += ["copy"] * ((torch.device(kwargs["device"]).type == "meta") != args[0].is_meta)
        return func(*args, **kwargs)


def waits(model: dict[str, Any], parallel: dict[str, Any], microbatches: int) -> list[str]:
    """In one step of the last rank."""
    axes = {axis: parallel.get(axis, 1) for axis in ("pipeline", "data", "tensor")}
    world = axes["pipeline"] * axes["data"] * axes["tensor"]
    settings = build_settings(
        {
            "name": "waits",
            "model": SIZES | model,
            "parallel": {"data": 1} | parallel,
            "batch": {"global_size": 2 * microbatches * axes["data"], "micro_size": 2},
            "corpus": {"sequence_length": 16},
        }
    )
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    try:
        with without_numbers():
            engine = Engine(model_config(settings.model), settings, build_mesh(**axes), device=torch.device("meta"))
            rows = torch.zeros(2 * microbatches, 16, dtype=torch.int64)
            with Waits() as seen:
                engine.step(0, rows, rows)
        return seen.seen
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_cpu_waits_for_the_losses_and_the_norms_alone(model: str, layout: str) -> None:
    parallel = LAYOUTS[layout]
    expected = ["copy", "copy"]  # the losses of the microbatches, the norms
    if parallel.get("data", 1) > 1:
        expected += ["copy", "number"]  # the loss, to be summed over the replicas and to be looked at
    for microbatches in (2, 4):
        assert sorted(waits(MODELS[model], parallel, microbatches)) == sorted(expected)
