"""Every communication of tensor parallelism as an autograd function whose backward is its conjugate.

| function         | forward        | backward       | in Megatron-LM's papers           |
|------------------|----------------|----------------|-----------------------------------|
| `copy`           | identity       | all-reduce     | f  (Shoeybi et al. 2019, fig. 3)  |
| `all_reduce`     | all-reduce     | identity       | g                                 |
| `split`          | own part       | all-gather     |                                   |
| `gather`         | all-gather     | own part       |                                   |
| `all_gather`     | all-gather     | reduce-scatter | g (Korthikanti et al. 2022, fig. 5) |
| `reduce_scatter` | reduce-scatter | all-gather     | g-bar                             |
| `all_to_all`     | all-to-all     | all-to-all     | (Jacobs et al. 2023, Ulysses)     |

`gather` is for a result that every rank then uses alike (its gradient is already whole on each rank); `all_gather`
is for an input of which each rank computes a part (the ranks' gradients are summed).

`mesh` is the one-dimensional DeviceMesh to communicate over. On a group of one, each function returns the very tensor
that it was given. None writes into its argument.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.exchange import (
    equal_parts,
    start_all_gather,
    start_all_reduce,
    start_all_to_all,
    start_reduce_scatter,
)


def copy(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Use the replicated `x` on every rank; the ranks' gradients of it are summed."""
    return x if mesh.size() == 1 else _Copy.apply(x, mesh)


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum of the ranks' `x`, on every rank."""
    return x if mesh.size() == 1 else _AllReduce.apply(x, mesh)


def split(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's equal part of the replicated `x` along `dim`."""
    return x if mesh.size() == 1 else _Split.apply(x, mesh, dim)


def gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The ranks' `x` concatenated along `dim`, for replicated use."""
    return x if mesh.size() == 1 else _Gather.apply(x, mesh, dim)


def all_gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The ranks' `x` concatenated along `dim`, for use of a part by each rank."""
    return x if mesh.size() == 1 else _AllGather.apply(x, mesh, dim)


def reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's equal part, along `dim`, of the sum of the ranks' `x`."""
    return x if mesh.size() == 1 else _ReduceScatter.apply(x, mesh, dim)


def all_to_all(x: Tensor, mesh: DeviceMesh, split_dim: int, concat_dim: int) -> Tensor:
    """Cut `x` along `split_dim`, send part i to rank i, concatenate what arrives along `concat_dim`."""
    return x if mesh.size() == 1 else _AllToAll.apply(x, mesh, split_dim, concat_dim)


def own_part(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's equal part of `x` along `dim`, contiguous; without autograd's conjugate."""
    return equal_parts(x, mesh.size(), dim)[mesh.get_local_rank()].contiguous()


def _exchange_parts(x: Tensor, mesh: DeviceMesh, split_dim: int, concat_dim: int) -> Tensor:
    return start_all_to_all(equal_parts(x, mesh.size(), split_dim), mesh, concat_dim).wait()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(gradient, ctx.mesh).wait(), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return start_all_reduce(x, mesh).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        return equal_parts(x, mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return start_all_gather(gradient, ctx.mesh, ctx.dim).wait(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        return start_all_gather(x, mesh, dim).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return own_part(gradient, ctx.mesh, ctx.dim), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        return start_all_gather(x, mesh, dim).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return start_reduce_scatter(gradient, ctx.mesh, ctx.dim).wait(), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        return start_reduce_scatter(x, mesh, dim).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return start_all_gather(gradient, ctx.mesh, ctx.dim).wait(), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, split_dim: int, concat_dim: int) -> Tensor:
        ctx.mesh, ctx.dims = mesh, (split_dim, concat_dim)
        return _exchange_parts(x, mesh, split_dim, concat_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return _exchange_parts(gradient, ctx.mesh, concat_dim, split_dim), None, None, None
