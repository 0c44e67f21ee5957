"""Collectives as started and awaited, without autograd: what `collectives.py` and the linear layers are made of.

Each `start_*` returns at once with a `Pending`; its `wait()` gives the result. A group of one must not come here.

Among CPUs, gloo's ring algorithms cost several times a plain exchange between two neighbours, so small groups
exchange directly: each rank sends to every peer what that peer needs and adds what it receives in rank order, which
makes sums equal to the bit on all ranks. Direct all-gather and reduce-scatter send exactly the bytes of a ring; a
direct all-reduce sends `n - 1` times the tensor, the same as a ring only for two ranks, and is used only there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

LARGEST_DIRECT_GROUP = 4


@dataclass
class Pending:
    """A collective under way. `wait` blocks (on CUDA: makes the current stream wait) and returns the result."""

    works: Sequence[dist.Work]
    finish: Callable[[], Tensor]
    keep_alive: object = None

    def wait(self, timeout: timedelta | None = None) -> Tensor:
        for work in self.works:
            if timeout is None:
                work.wait()
            else:
                work.wait(timeout)
        return self.finish()


def start_all_reduce(x: Tensor, mesh: DeviceMesh, *, overwrite: bool = False) -> Pending:
    """Sum `x` over the ranks of `mesh`; with `overwrite` the result may be written into `x`."""
    group = mesh.get_group()
    if _is_direct(mesh) and group.size() == 2:
        x = x.contiguous()
        works, (theirs,) = _exchange([x], [x.shape], group)
        return Pending(works, lambda: theirs.add_(x))
    total = x if overwrite and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=group, async_op=True)
    return Pending([work], lambda: total)


def start_all_gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """Concatenate the `x` of all ranks along `dim`, in rank order."""
    group = mesh.get_group()
    x = x.contiguous()
    if _is_direct(mesh):
        works, pieces = _exchange([x] * (group.size() - 1), [x.shape] * (group.size() - 1), group)
        pieces.insert(group.rank(), x)
        return Pending(works, lambda: torch.cat(pieces, dim))
    stacked = x.new_empty((group.size(), *x.shape))
    work = dist.all_gather_single(stacked.flatten(0, 1) if x.dim() else stacked, x, group=group, async_op=True)
    dim = dim % x.dim()
    return Pending([work], lambda: stacked.movedim(0, dim).flatten(dim, dim + 1), keep_alive=x)


def start_reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """Sum `x` over the ranks and keep this rank's equal part along `dim`.

    Raises:
        ValueError: `dim` does not divide into as many parts as there are ranks.
    """
    group = mesh.get_group()
    parts = [part.contiguous() for part in equal_parts(x, group.size(), dim)]
    if _is_direct(mesh):
        mine = parts[group.rank()]
        others = [part for peer, part in enumerate(parts) if peer != group.rank()]
        works, received = _exchange(others, [mine.shape] * len(others), group)
        received.insert(group.rank(), mine)
        return Pending(works, lambda: _sum_in_order(received), keep_alive=others)
    stacked = torch.cat(parts)
    total = torch.empty_like(parts[0])
    work = dist.reduce_scatter_single(total, stacked, group=group, async_op=True)
    return Pending([work], lambda: total, keep_alive=stacked)


def start_all_to_all(parts: Sequence[Tensor], mesh: DeviceMesh) -> tuple[Sequence[dist.Work], list[Tensor]]:
    """Send `parts[i]`, all of one shape, to rank i; the list holds what each rank sent here once the works are done."""
    group = mesh.get_group()
    if _is_direct(mesh):
        rank = group.rank()
        others = [part for peer, part in enumerate(parts) if peer != rank]
        works, received = _exchange(others, [parts[0].shape] * len(others), group)
        received.insert(rank, parts[rank])
        return works, received
    stacked = torch.stack(list(parts))
    result = torch.empty_like(stacked)
    work = dist.all_to_all_single(result, stacked, group=group, async_op=True)
    return [work], list(result.unbind(0))


def equal_parts(x: Tensor, ranks: int, dim: int) -> tuple[Tensor, ...]:
    """Views of the `ranks` equal parts of `x` along `dim`."""
    size = x.shape[dim]
    if size % ranks:
        raise ValueError(
            f"dim {dim} of a tensor of shape {list(x.shape)} has size {size}, which does not divide over {ranks} ranks"
        )
    return x.split(size // ranks, dim) if size else (x,) * ranks


def _is_direct(mesh: DeviceMesh) -> bool:
    return mesh.device_type == "cpu" and mesh.size() <= LARGEST_DIRECT_GROUP


def _exchange(
    outgoing: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup
) -> tuple[list[dist.Work], list[Tensor]]:
    """Send `outgoing[i]` to the i-th peer (own rank left out) and receive a tensor of `shapes[i]` from it."""
    peers = [rank for rank in range(group.size()) if rank != group.rank()]
    received = [outgoing[0].new_empty(shape) for shape in shapes]
    works = [group.recv([tensor], peer, 0) for tensor, peer in zip(received, peers, strict=True)]
    works += [group.send([tensor], peer, 0) for tensor, peer in zip(outgoing, peers, strict=True)]
    return works, received


def _sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total += tensor
    return total
