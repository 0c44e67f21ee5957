"""The regions of a foreign model in which features are split: from its column layers to its row layer.

Models that others wrote call `q_proj(x)`, `k_proj(x)`, `v_proj(x)`. Each call's gradient of x is a sum over the ranks;
the sum of those sums can be one message. Under sequence parallelism x can be gathered once for all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.collectives import all_gather, copy
from weft.parallel.tensor.split_random import SplitRandom, drops

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Region:
    """What the column and row layers of one module share during each of its forwards.

    - With `shares_input`, the copy of their input (`take`): column layers that read the same tensor share one reduction
      of its gradient. Copies are remembered by the identity of the tensor from the start to the end of the module's
      forward; a recomputed forward begins anew, and nothing outlives a forward. A layer that is called from elsewhere
      finds the region closed and reduces by itself.
    - Random numbers: from a column layer to the row layer, dropout differs between the ranks.
    - With `gathers_sequence`, the module is given its part of the sequence and sees the whole: its first tensor is
      gathered before the forward, and the gradient reduced and scattered after the backward.
    """

    def __init__(self, mesh: DeviceMesh, *, shares_input: bool = False, gathers_sequence: bool = False) -> None:
        self.mesh, self.shares_input, self.gathers_sequence = mesh, shares_input, gathers_sequence
        self._copies: dict[tuple[int, bool], tuple[Tensor, Tensor]] | None = None
        self._random = SplitRandom(mesh)
        self._drops = False

    @property
    def is_open(self) -> bool:
        """Whether the module's forward is running."""
        return self._copies is not None

    @property
    def reduces(self) -> bool:
        """Whether the column layers leave the reduction of their input's gradient to the region."""
        return self.shares_input or self.gathers_sequence

    def take(self, x: Tensor) -> Tensor:
        """x itself for a column layer, with its gradient's reduction where that is the region's."""
        assert self._copies is not None
        if not self.shares_input:
            return x
        key = id(x), torch.is_grad_enabled()
        if key not in self._copies:
            # the entry keeps x alive, so that no other tensor can have its id
            self._copies[key] = x, copy(x, self.mesh)
        return self._copies[key][1]

    def begin_split(self, device: torch.device) -> None:
        """Features are split from here on."""
        if self._drops:
            self._random.enter(device)

    def end_split(self) -> None:
        """Features are whole again."""
        self._random.leave()

    def attach(self, module: nn.Module) -> None:
        """Open with each forward of `module`, close after it, also when it fails."""
        module.register_forward_pre_hook(self._open, with_kwargs=True)
        module.register_forward_hook(self._close, always_call=True)

    def _open(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Arguments | None:
        self._copies = {}
        self._drops = module.training and drops(module)
        if not self.gathers_sequence:
            return None
        return replace_first(arguments, keywords, lambda x: all_gather(x, self.mesh, 1))

    def _close(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._copies = None
        self._random.leave()


def replace_first(arguments: tuple[Any, ...], keywords: dict[str, Any], change: Any) -> Arguments:
    """The arguments of a call with `change` made to the first that is a tensor of floating-point numbers."""
    for index, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*arguments[:index], change(value), *arguments[index + 1 :]), keywords
    for name, value in keywords.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return arguments, keywords | {name: change(value)}
    return arguments, keywords
