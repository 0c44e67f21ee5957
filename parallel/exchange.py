"""Collectives as started and awaited, without autograd: what `collectives.py` and the linear layers are made of.

Each `start_*` returns at once with a `Pending`; its `wait()` gives the result. A group of one must not come here.

Among CPUs, gloo's ring algorithms cost several times a plain exchange between two neighbours, so small groups
exchange directly: each rank sends to every peer what that peer needs and adds what it receives in rank order, which
makes sums equal to the bit on all ranks. Ranks of one machine do so through the memory that they share (`links.py`).
Direct all-gather and reduce-scatter send exactly the bytes of a ring; a direct all-reduce sends `n - 1` times the
tensor, the same as a ring only for two ranks, and is used only there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.links import Arrival
from weft.parallel.meeting import links_of

LARGEST_DIRECT_GROUP = 4


class Work(Protocol):
    """What can be waited for: of torch, or a message that is to come over a link."""

    def wait(self, timeout: timedelta = ..., /) -> bool: ...


@dataclass
class Pending:
    """A collective under way. `wait` blocks (on CUDA: makes the current stream wait) and returns the result."""

    works: Sequence[Work]
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
        exchange = _Exchange([x, x], group)
        return Pending(exchange.works, lambda: exchange.sum(x, overwrite=overwrite))
    total = x if overwrite and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=group, async_op=True)
    return Pending([work], lambda: total)


def start_all_gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """Concatenate the `x` of all ranks along `dim`, in rank order."""
    group = mesh.get_group()
    x = x.contiguous()
    if _is_direct(mesh):
        exchange = _Exchange([x] * group.size(), group)
        return Pending(exchange.works, lambda: exchange.concatenate(x, dim))
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
        exchange = _Exchange(parts, group)
        return Pending(exchange.works, lambda: exchange.sum(parts[group.rank()]), keep_alive=parts)
    stacked = torch.cat(parts)
    total = torch.empty_like(parts[0])
    work = dist.reduce_scatter_single(total, stacked, group=group, async_op=True)
    return Pending([work], lambda: total, keep_alive=stacked)


def start_all_to_all(parts: Sequence[Tensor], mesh: DeviceMesh, dim: int) -> Pending:
    """Send `parts[i]`, all of one shape, to rank i; concatenate along `dim` what the ranks have sent here."""
    group = mesh.get_group()
    parts = [part.contiguous() for part in parts]
    if _is_direct(mesh):
        exchange = _Exchange(parts, group)
        return Pending(exchange.works, lambda: exchange.concatenate(parts[group.rank()], dim), keep_alive=parts)
    stacked = torch.stack(parts)
    result = torch.empty_like(stacked)
    work = dist.all_to_all_single(result, stacked, group=group, async_op=True)
    return Pending([work], lambda: torch.cat(result.unbind(0), dim), keep_alive=stacked)


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


class _Exchange:
    """Sends `outgoing[i]`, contiguous and of one shape, to rank i, and receives as much from it; the own part stays."""

    def __init__(self, outgoing: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._rank = group.rank()
        self._received: dict[int, Tensor | Arrival] = {}
        self.works: list[Work] = []
        links, sends = links_of(group), []
        for peer, x in enumerate(outgoing):
            if peer == self._rank:
                continue
            if peer in links:
                links[peer].send(x)
                arrival = links[peer].receive(x.dtype, x.shape)
                self._received[peer] = arrival
                self.works.append(arrival)
            else:
                # A dry run is one of ranks that have links: it makes no room for what never comes.
                self._received[peer] = room = x if dist.get_backend(group) == "fake" else torch.empty_like(x)
                self.works.append(group.recv([room], peer, 0))
                sends.append(group.send([x], peer, 0))
        self.works += sends

    def sum(self, mine: Tensor, *, overwrite: bool = False) -> Tensor:
        """The sum of what all ranks sent here, in rank order; `mine` is what this one keeps, and may overwrite."""
        first, second, *others = self._in_order(mine)
        total = mine.add_(second if first is mine else first) if overwrite else first + second
        for x in others:
            total += x
        self._release()
        return total

    def concatenate(self, mine: Tensor, dim: int) -> Tensor:
        """What all ranks sent here, one behind the other along `dim`; `mine` is what this one keeps."""
        whole = torch.cat(self._in_order(mine), dim)
        self._release()
        return whole

    def _in_order(self, mine: Tensor) -> list[Tensor]:
        ranks = sorted([*self._received, self._rank])
        return [mine if rank == self._rank else _tensor_of(self._received[rank]) for rank in ranks]

    def _release(self) -> None:
        for received in self._received.values():
            if isinstance(received, Arrival):
                received.release()
        self._received.clear()


def _tensor_of(received: Tensor | Arrival) -> Tensor:
    return received if isinstance(received, Tensor) else received.tensor
