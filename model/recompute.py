"""Which parts of a stage's blocks compute their activations again in the backward."""

from collections.abc import Collection, Container, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.parallel import recomputed
from weft.parallel.offload import ActivationOffload

Recompute = Literal["none", "selective", "full"]


def recomputed_parts(
    recompute: Recompute, layers: Iterable[int], chosen: Container[int] | None, modules: Collection[str]
) -> dict[int, Collection[str]]:
    """What each block computes again: "block" is all of it, "core" and "mlp" are parts; None chooses all blocks."""
    parts: Collection[str] = {"none": (), "selective": modules, "full": ("block",)}[recompute]
    return {number: parts if chosen is None or number in chosen else () for number in layers}


def run_block(block: nn.Module, offload: ActivationOffload | None, *inputs: Tensor, **options: Any) -> Tensor:
    """The block's result, computed again in the backward and kept on the host until then as it is to be."""
    with nullcontext() if offload is None else offload.keep(block):
        if block.recomputes and torch.is_grad_enabled():
            return recomputed(block, *inputs, **options)
        result: Tensor = block(*inputs, **options)
        return result
