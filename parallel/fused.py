"""Chains of elementwise operations as one kernel each, by `torch.compile`.

Computed one by one, every operation of a chain reads its operands from memory and writes its result there. What is
compiled are plain functions of tensors: they hold no communication, no matrix product, no module and no state, so that
layouts, recomputation and schedules, which are made of those, meet the same graph as without.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

MOST_GRAPHS = 64  # of one function: one for each shape; what comes after runs uncompiled


class Fusing(nn.Module):
    """A module that computes its chains of elementwise operations by `fused`."""

    fuses: bool = False

    def fused(self, chain: Callable[..., Tensor], *args: Any) -> Tensor:
        """`chain(*args)`, compiled where the module trains after `fuse_chains`.

        Texts to be evaluated or continued have many lengths, each of which would be compiled for itself. Nor is it
        compiled where every operation is watched, as of a step whose memory is counted: torch, which cannot compile
        there, would never do so again.
        """
        compiles = self.fuses and torch.is_grad_enabled() and _get_current_dispatch_mode() is None
        return (_compiled(chain) if compiles else chain)(*args)


def fuse_chains(module: nn.Module) -> None:
    """Have all parts of a module compile their chains when they train next."""
    for part in module.modules():
        if isinstance(part, Fusing):
            part.fuses = True


@cache
def _compiled(chain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The graph of a shape must not change between a forward and its recomputation, as one for any shape would.
    return torch.compile(chain, dynamic=False, recompile_limit=MOST_GRAPHS)  # type: ignore[call-overload,no-any-return]
