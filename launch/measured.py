"""The memory of one rank as it is: of the engine's own tensors, and of a step that is watched."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.launch.engine import Engine, StepOutcome
from weft.launch.plan.breakdown import Memory
from weft.parallel import storage_bytes, track_memory


def measured_step(engine: Engine, step: int, inputs: Tensor, targets: Tensor) -> tuple[StepOutcome, Memory]:
    """`engine.step`, and the bytes that this rank holds by kind.

    Activations are the most that a step holds besides what outlives it, up to the optimiser's update: all that the
    backward passes need, the logits, messages, and what operations hold for a moment. On a GPU torch's allocator counts
    them, elsewhere the tensors are followed.
    """
    peaks: list[int] = []
    watch = _AllocatorPeak(engine.device) if engine.device.type == "cuda" else track_memory()
    with watch as memory:
        hook = engine.optimizer.register_step_pre_hook(lambda *_: peaks.append(memory.peak))
        try:
            outcome = engine.step(step, inputs, targets)
        finally:
            hook.remove()
    return outcome, held_memory(engine, activations=max(peaks, default=memory.peak))


def held_memory(engine: Engine, *, activations: int = 0) -> Memory:
    """What this rank holds between steps, by kind, with the gradients and the `activations` of a step.

    Float32 copies of weights that are computed with in less count as the optimiser's.
    """
    replicas = engine.updates.replicas
    parameters = [*map(_local, engine.parameters), *replicas.stored_weights()]
    updated = [weight for group in engine.optimizer.param_groups for weight in group["params"]]
    masters = storage_bytes([*parameters, *updated]) - storage_bytes(parameters)
    return Memory(
        parameters=storage_bytes(parameters),
        gradients=replicas.gradient_bytes,
        optimizer=storage_bytes(_tensors(engine.optimizer.state.values())) + masters,
        buffers=storage_bytes(buffer for module in engine.modules for buffer in module.buffers()),
        activations=activations,
    )


class _AllocatorPeak:
    """The most bytes that torch's CUDA allocator hands out inside the block, above what it had before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def __enter__(self) -> "_AllocatorPeak":
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self._before


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
