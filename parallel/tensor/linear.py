"""Column- and row-parallel linear layers (Shoeybi et al. 2019, §3; Korthikanti et al. 2022, §4.2.2)."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.parallel.collectives import gather, split
from weft.parallel.deferred import WeightGradientQueue
from weft.parallel.exchange import start_all_reduce
from weft.parallel.sharding import Sharding, replicated, take_shard
from weft.parallel.tensor.divide import check_features
from weft.parallel.tensor.matmul import column_matmul, row_matmul
from weft.parallel.tensor.packed import Packable, PackedWeight
from weft.parallel.tensor.partial import ShardedModule
from weft.parallel.tensor.region import Region


class ParallelLinear(ShardedModule, nn.Linear):
    """What column- and row-parallel layers share: the shard's shape, its declaration, and the plain layer's weights."""

    weight_gradient_queue: WeightGradientQueue | None = None
    region: Region | None = None  # set by `parallelize`

    def __init__(
        self, in_features: int, out_features: int, bias: bool, weight: Sharding, bias_sharding: Sharding, **factory: Any
    ) -> None:
        nn.Module.__init__(self)
        self.full_in_features, self.full_out_features = in_features, out_features
        self.out_features, self.in_features = weight.local_shape
        self.mesh = weight.mesh
        self.shardings = {"weight": weight} | ({"bias": bias_sharding} if bias else {})
        self.weight = nn.Parameter(torch.empty(weight.local_shape, **factory))
        self.bias = nn.Parameter(torch.empty(bias_sharding.local_shape, **factory)) if bias else None  # type: ignore[assignment]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what the plain layer would draw from torch's generator, and keep this rank's shard.

        The generators of all ranks must be in the same state; they are in the same state again afterwards.
        """
        if self.weight.is_meta:
            return
        bound = 1 / sqrt(self.full_in_features) if self.full_in_features else 0.0
        for name, sharding in self.shardings.items():
            parameter = self.get_parameter(name)
            full = torch.empty(sharding.full_shape, dtype=parameter.dtype, device=parameter.device)
            if name == "weight":
                nn.init.kaiming_uniform_(full, a=sqrt(5))  # as nn.Linear: the same bound, but for its last bit
            else:
                full.uniform_(-bound, bound)
            with torch.no_grad():
                parameter.copy_(take_shard(full, sharding))

    def matrix(self) -> Tensor:
        """The weight as the forward uses it, `[out_features, in_features]` of this rank."""
        weight: Tensor = self.used("weight")
        return weight

    def extra_repr(self) -> str:
        weight = self.shardings["weight"]
        fused = f", chunks={list(weight.chunks)}" if weight.chunks else ""
        replicas = f", replicas={weight.replicas}" if weight.replicas > 1 else ""
        return (
            f"in_features={self.full_in_features}, out_features={self.full_out_features}, "
            f"bias={self.bias is not None}, local weight={list(self.weight.shape)}, ranks={self.mesh.size()}"
            f"{fused}{replicas}"
        )


class ColumnParallelLinear(ParallelLinear):
    """`y_r = x W_r^T + b_r`: output features split over `mesh`, x whole on every rank.

    Forward: no communication (all-gather with `gather_output`). Backward: all-reduce of dL/dx.
    With `sequence_parallel`, x is split along its sequence, dim -2: forward all-gather, backward reduce-scatter.
    Equal to `nn.Linear(in_features, out_features)`, seed for seed, on any number of ranks.

    Shapes: x `[…, in_features]` (`[…, sequence / tensor, in_features]`), result `[…, out_features / tensor]`
    (`[…, out_features]` with `gather_output`).

    `chunks`: sizes of projections fused along the output (q, k, v; gate, up), each split by itself.
    `replicas`: that many neighbouring ranks hold the same shard, and their gradients are summed.

    Raises:
        ValueError: `out_features`, or one of its `chunks`, does not divide over the ranks and is not gathered; chunks
            or replicas together with `gather_output`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        chunks: tuple[int, ...] = (),
        replicas: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if chunks and sum(chunks) != out_features:
            raise ValueError(f"chunks {list(chunks)} add up to {sum(chunks)}, not to out_features {out_features}")
        if gather_output and (chunks or replicas > 1):
            raise ValueError("gather_output would mix up fused chunks and repeat replicas; gather each part by itself")
        for size in () if gather_output else chunks or (out_features,):
            check_features("out_features", size, mesh.size() // replicas)
        shared: dict[str, Any] = {"chunks": chunks, "replicas": replicas, "partial_gradient": replicas > 1}
        weight = Sharding(Shard(0), mesh, (out_features, in_features), **shared)
        bias_sharding = Sharding(Shard(0), mesh, (out_features,), **shared)
        super().__init__(in_features, out_features, bias, weight, bias_sharding, device=device, dtype=dtype)
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        region = self.region if self.region is not None and self.region.is_open else None
        reduced_outside = region is not None and region.reduces
        if region is not None:
            x = region.take(x)
            if not self.gather_output:
                region.begin_split(x.device)
        (y,) = column_matmul(
            x,
            [self.matrix()],
            [self.used("bias")],
            mesh=self.mesh,
            sequence_parallel=self.sequence_parallel,
            queue=self.weight_gradient_queue,
            reduce_input_gradient=not reduced_outside,
        )
        # the last rank's columns beyond the full width are padding
        return gather(y, self.mesh, -1)[..., : self.full_out_features] if self.gather_output else y


class RowParallelLinear(ParallelLinear, Packable):
    """`y = sum over ranks of x_r W_r^T, + b`: input features split over `mesh`, bias whole and added once.

    Forward: all-reduce of y. Backward: no communication.
    With `sequence_parallel`, y is split along its sequence, dim -2: forward reduce-scatter, backward all-gather; the
    gradient of the bias is summed over the ranks.
    Equal to `nn.Linear(in_features, out_features)`, seed for seed, on any number of ranks.

    Shapes: x `[…, in_features / tensor]` (`[…, in_features]` when not `input_is_parallel`), result
    `[…, out_features]` (`[…, sequence / tensor, out_features]`).

    Raises:
        ValueError: `in_features` does not divide over the ranks.
    """

    _packed: PackedWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_features("in_features", in_features, mesh.size())
        weight = Sharding(Shard(1), mesh, (out_features, in_features))
        partial = sequence_parallel and mesh.size() > 1
        bias_sharding = replicated(mesh, (out_features,), partial_gradient=partial)
        super().__init__(in_features, out_features, bias, weight, bias_sharding, device=device, dtype=dtype)
        self.input_is_parallel, self.sequence_parallel = input_is_parallel, sequence_parallel

    def pack_weights(self, rows: int) -> None:
        self._packed = PackedWeight([self], rows=rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = split(x, self.mesh, -1)
        y = self._product(x)
        if self.region is not None:
            self.region.end_split()
        bias = self.used("bias")
        return y if bias is None else y + bias.to(y.dtype)  # bias is float32 under autocast

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            part = self._packed.product(x)
            return part if self.mesh.size() == 1 else start_all_reduce(part, self.mesh, overwrite=True).wait()
        return row_matmul(
            x,
            self.matrix(),
            mesh=self.mesh,
            sequence_parallel=self.sequence_parallel,
            queue=self.weight_gradient_queue,
        )


class ReplicatedLinear(ShardedModule, nn.Linear):
    """`y = x W^T + b` with the whole weight on every rank, for few features between split layers.

    Shapes: x `[…, sequence, in_features]` (`[…, sequence / tensor, in_features]` with `sequence_parallel`), result
    `[…, out_features]` likewise.
    Communication: none; with `sequence_parallel` the gradients of weight and bias are summed over `mesh`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, mesh: DeviceMesh, sequence_parallel: bool = False, **factory: Any
    ) -> None:
        super().__init__(in_features, out_features, **factory)
        partial = sequence_parallel and mesh.size() > 1
        self.shardings = {
            name: replicated(mesh, parameter.shape, partial_gradient=partial)
            for name, parameter in self.named_parameters()
        }

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.used("weight"), self.used("bias"))
