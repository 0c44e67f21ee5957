"""One reduction of the input's gradient for several column layers that are called one after the other.

Models that others wrote call `q_proj(x)`, `k_proj(x)`, `v_proj(x)`. Each call's gradient of x is a sum over the ranks;
the sum of those sums can be one message.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.collectives import copy


class SharedInput:
    """What the column layers of one module read, copied once for all of them.

    Copies are remembered from the start to the end of each forward of the module that it is attached to, by the
    identity of the tensor; a recomputed forward begins anew, and nothing outlives a forward. A layer that is called
    from elsewhere finds it closed and reduces by itself.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._copies: dict[tuple[int, bool], tuple[Tensor, Tensor]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the module's forward is running."""
        return self._copies is not None

    def take(self, x: Tensor) -> Tensor:
        """x itself, its gradient summed over the ranks; the same copy for the same x."""
        assert self._copies is not None
        key = id(x), torch.is_grad_enabled()
        if key not in self._copies:
            # the entry keeps x alive, so that no other tensor can have its id
            self._copies[key] = x, copy(x, self.mesh)
        return self._copies[key][1]

    def attach(self, module: nn.Module) -> None:
        """Open with each forward of `module`, close after it, also when it fails."""
        module.register_forward_pre_hook(self._open)
        module.register_forward_hook(self._close, always_call=True)

    def _open(self, module: nn.Module, arguments: Any) -> None:
        self._copies = {}

    def _close(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._copies = None
