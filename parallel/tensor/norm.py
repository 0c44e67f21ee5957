"""Norms that know of sequence parallelism: each rank normalises its part of the sequence with the whole weight.

The weight is replicated, its gradient a sum over the ranks' parts of the sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.parallel.collectives import all_reduce, copy
from weft.parallel.fused import Fusing
from weft.parallel.sharding import Sharding, replicated
from weft.parallel.tensor.partial import ShardedModule


class RMSNorm(Fusing, ShardedModule, nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · (weight + offset)` over the last dim (Zhang and Sennrich 2019).

    Shape: x `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]` with `sequence_parallel`), result alike.
    Communication: none; with `sequence_parallel` the weight's gradient is summed over `mesh`.

    `offset`: 1 where the weights are stored as their distance from 1, as Gemma's are.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = None,
        *,
        mesh: DeviceMesh,
        sequence_parallel: bool = False,
        offset: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(hidden_size, eps, **factory)
        self.offset = offset
        self.shardings = {"weight": replicated(mesh, (hidden_size,), partial_gradient=sequence_parallel)}
        if offset and not self.weight.is_meta:
            nn.init.constant_(self.weight, 1.0 - offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(_rms_norm, x, self.used("weight"), self.eps, self.offset)


class LayerNorm(Fusing, ShardedModule, nn.LayerNorm):
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
        return self.fused(_layer_norm, x, self.used("weight"), self.used("bias"), self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float | None, offset: float) -> Tensor:
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    # in half precision the weight's distance from 1 would be rounded before it is used
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide) + offset, eps).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class SplitRMSNorm(ShardedModule):
    """`x / sqrt(mean(x²) + eps) · weight` over features that are split over the ranks of `mesh`.

    Shapes: x `[batch, sequence, features / tensor]`, result alike. `replicas` neighbouring ranks hold the same
    features; the gradient of their weight is summed over them.
    Communication: forward and backward one all-reduce of `[batch, sequence, 1]`.
    """

    def __init__(
        self, features: int, eps: float, *, mesh: DeviceMesh, replicas: int = 1, offset: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        self.features, self.eps, self.mesh, self.replicas, self.offset = features, eps, mesh, replicas, offset
        sharding = Sharding(Shard(0), mesh, (features,), replicas=replicas, partial_gradient=replicas > 1)
        self.shardings = {"weight": sharding}
        self.weight = nn.Parameter(torch.full(sharding.local_shape, 1.0 - offset, **factory))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True) / (self.features * self.replicas)
        # each rank's features depend on the sum, so that the ranks' gradients of it are summed in turn
        mean = copy(all_reduce(squares, self.mesh), self.mesh)
        normed = (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)
        result: Tensor = normed * (self.used("weight") + self.offset)
        return result

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, local features={self.weight.shape[0]}"
