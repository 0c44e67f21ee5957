"""What data ranks hold under ZeRO and half precision, measured on one rank: the tables of docs/memory.md.

    python docs/memory_costs.py

The engine trains on the CPU as one rank of four, whose messages torch's fake process group swallows; every tensor that
it holds is counted. Figures are bytes per parameter of the model.
"""

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from weft.launch.engine import Engine
from weft.launch.measured import measured_step
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh, storage_bytes, track_memory, without_numbers

RANKS, LENGTH, LAYERS, HIDDEN = 4, 16, 8, 384
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}


CHOICES: list[dict[str, Any]] = [
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ["core"]},
    {"recompute": "selective", "recompute_modules": ["core", "mlp"]},
    {"recompute": "full", "recompute_layers": "1 of 2"},
    {"recompute": "full"},
    {"recompute": "none", "offload": "activations"},
    {"recompute": "full", "offload": "activations"},
]


class Held(NamedTuple):
    """Bytes per parameter: the model's weights; all that outlives a step; all when the backward passes are done."""

    weights: float
    between_steps: float
    before_update: float


def measure(zero: int, precision: str, **parallel: Any) -> Held:
    """One rank's memory in the second step of a model without activations to speak of."""
    settings = build_settings(
        {
            "name": "memory",
            "model": MODEL,
            "parallel": {"data": RANKS, "zero": zero, **parallel},
            "batch": {"global_size": RANKS, "micro_size": 1},
            "train": {"precision": precision},
            "corpus": {"sequence_length": LENGTH},
        }
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        return _measure(settings)
    finally:
        dist.destroy_process_group()


def _measure(settings: Any) -> Held:
    config = model_config(settings.model)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    with track_memory() as memory:
        engine = Engine(config, settings, build_mesh(data=RANKS))
        engine.step(0, tokens, tokens)
        between, finish = memory.count("cpu"), engine.updates.replicas.finish
        before_update = []

        def finish_and_look() -> None:
            before_update.append(memory.count("cpu"))
            finish()

        engine.updates.replicas.finish = finish_and_look  # type: ignore[method-assign]
        engine.step(1, tokens, tokens)
    parameters = [getattr(p, "_local_tensor", p) for p in engine.parameters]
    count = config.parameters
    return Held(storage_bytes(parameters) / count, between / count, before_update[0] / count)


def formula(zero: int, precision: str, ranks: int = RANKS) -> Held:
    """Rajbhandari et al. 2020, §3.1 and §5, with gradients summed in float32.

    A weight is 2 bytes in half precision and 4 in float32, its gradient 4, AdamW's two averages 8; a float32 copy of it
    4, which zero 0 needs in half precision only, and which is all that zero 3 holds of the weight.
    """
    weight = 4 if precision == "fp32" else 2
    if zero == 3:
        return Held(4 / ranks, 12 / ranks, 16 / ranks)
    states = 8 + (4 if zero or precision != "fp32" else 0)
    kept = weight + states / (ranks if zero else 1)
    gradients = 4 / ranks if zero == 2 else 4
    return Held(weight, kept if zero else kept + 4, kept + gradients)


class Recomputed(NamedTuple):
    """Activations of a step, in bytes per token, layer and hidden unit, and matrix operations over those without."""

    activations: float
    operations: float


def measure_recompute(precision: str, **parallel: Any) -> Recomputed:
    """A step of one process on one microbatch, run without numbers."""
    settings = build_settings(
        {
            "name": "recompute",
            "model": MODEL
            | {"hidden_size": HIDDEN, "intermediate_size": 8 * HIDDEN // 3, "max_position_embeddings": 512},
            "parallel": parallel,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"precision": precision},
            "corpus": {"sequence_length": 512},
        }
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with without_numbers():
            tokens = torch.empty(1, 512, dtype=torch.int64, device="meta")
            engine = Engine(model_config(settings.model), settings, build_mesh(), device=torch.device("meta"))
            _, memory = measured_step(engine, 0, tokens, tokens)
            with FlopCounterMode(display=False) as counter:
                engine.step(1, tokens, tokens)
        return Recomputed(memory.activations / (512 * LAYERS * HIDDEN), counter.get_total_flops())
    finally:
        dist.destroy_process_group()


def main() -> None:
    warnings.filterwarnings("ignore")
    print(f"bytes per parameter on each of {RANKS} data ranks: measured (formula)")
    print(f"{'precision':<10} {'zero':>4} {'weights':>16} {'between steps':>16} {'before the update':>18}")
    for precision in ("fp32", "bf16"):
        for zero in range(4):
            pairs = zip(measure(zero, precision), formula(zero, precision), strict=True)
            cells = [f"{seen:.2f} ({said:.2f})" for seen, said in pairs]
            print(f"{precision:<10} {zero:>4} {cells[0]:>16} {cells[1]:>16} {cells[2]:>18}")
    print("\nrecompute: bytes of activations per token, layer and hidden unit; matrix operations of a step")
    print(f"{'recompute':<26} {'fp32':>8} {'bf16':>8} {'operations':>11}")
    least = measure_recompute("fp32").operations
    for choice in CHOICES:
        full, half = (measure_recompute(precision, **choice) for precision in ("fp32", "bf16"))
        said = " ".join(", ".join(value) if isinstance(value, list) else value for value in choice.values())
        said = said.replace("activations", "offloaded")
        print(f"{said:<26} {full.activations:>8.1f} {half.activations:>8.1f} {full.operations / least:>10.2f} ×")


if __name__ == "__main__":
    main()
