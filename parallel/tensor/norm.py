"""Norms that know of sequence parallelism: each rank normalises its part of the sequence with the whole weight.

The weight is replicated, its gradient a sum over the ranks' parts of the sequence.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.sharding import replicated
from weft.parallel.tensor.partial import ShardedModule


class RMSNorm(ShardedModule, nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dim (Zhang and Sennrich 2019).

    Shape: x `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]` with `sequence_parallel`), result alike.
    Communication: none; with `sequence_parallel` the weight's gradient is summed over `mesh`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = None,
        *,
        mesh: DeviceMesh,
        sequence_parallel: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(hidden_size, eps, **factory)
        self.shardings = {"weight": replicated(mesh, (hidden_size,), partial_gradient=sequence_parallel)}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.used("weight"), self.eps)


class LayerNorm(ShardedModule, nn.LayerNorm):
    """`(x − mean) / sqrt(variance + eps) · weight + bias` over the last dim (Ba et al. 2016).

    Shapes and communication as for `RMSNorm`.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, *, mesh: DeviceMesh, sequence_parallel: bool = False, **factory: Any
    ) -> None:
        super().__init__(hidden_size, eps, **factory)
        sharding = replicated(mesh, (hidden_size,), partial_gradient=sequence_parallel)
        self.shardings = {"weight": sharding, "bias": sharding}

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.used("weight"), self.used("bias"), self.eps)
