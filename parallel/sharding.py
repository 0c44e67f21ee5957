"""How a module declares which of its parameters is split over ranks, and how others read that.

Parameters are plain local tensors. A module that splits one says so in its `shardings` dictionary, in torch's own
placement words; a parameter without an entry is replicated and its gradient whole on every rank. Initialisation,
gradient reductions, the gradient norm, checkpoints and export read the declaration and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from weft.parallel.exchange import start_all_gather


class Slice(NamedTuple):
    """`length` entries from `full_start` of the full parameter stand at `local_start` of the shard."""

    full_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Sharding:
    """The part of one parameter that a rank of `mesh` holds.

    `chunks` are the full sizes of the projections fused along the split dim (qkv, gate and up): each is split by
    itself. `replicas` neighbouring ranks hold the same shard (key-value heads fewer than ranks). Where a size does not
    divide, the last shards end in zero rows, which are not part of the parameter.

    `partial_gradient`: each rank's gradient of what it shares with others is one term of a sum (norms under sequence
    parallelism, replicated key-value heads); `parallel.data.partial` adds them up.
    """

    placement: Placement
    mesh: DeviceMesh
    full_shape: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    replicas: int = 1
    partial_gradient: bool = False

    @property
    def dim(self) -> int | None:
        """The split dim; None when replicated."""
        return self.placement.dim if isinstance(self.placement, Shard) else None

    @property
    def shards(self) -> int:
        """Number of different shards."""
        return 1 if self.dim is None else self.mesh.size() // self.replicas

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of every rank's shard, padding included."""
        if self.dim is None:
            return self.full_shape
        local = sum(self._chunk_length(size) for size in self._chunk_sizes())
        return (*self.full_shape[: self.dim], local, *self.full_shape[self.dim + 1 :])

    def slices(self, rank: int | None = None) -> list[Slice]:
        """Which entries along the split dim a rank (default: this one) holds, and where; padding is not listed."""
        if self.dim is None:
            raise ValueError("a replicated parameter has no slices")
        index = (self.mesh.get_local_rank() if rank is None else rank) // self.replicas
        result, full_start, local_start = [], 0, 0
        for size in self._chunk_sizes():
            length = self._chunk_length(size)
            offset = min(index * length, size)
            held = min(length, size - offset)
            if held:
                result.append(Slice(full_start + offset, local_start, held))
            full_start, local_start = full_start + size, local_start + length
        return result

    def _chunk_sizes(self) -> tuple[int, ...]:
        assert self.dim is not None
        return self.chunks or (self.full_shape[self.dim],)

    def _chunk_length(self, size: int) -> int:
        return -(-size // self.shards)


def shardings(module: nn.Module) -> dict[str, Sharding]:
    """The declared shardings of all parameters under `module`, by qualified name; undeclared ones are replicated."""
    return {
        f"{prefix}.{name}" if prefix else name: sharding
        for prefix, child in module.named_modules(remove_duplicate=False)
        for name, sharding in getattr(child, "shardings", {}).items()
    }


def take_shard(full: Tensor, sharding: Sharding, rank: int | None = None) -> Tensor:
    """A rank's shard (default: this rank's) of the full parameter, as a new tensor."""
    if sharding.dim is None:
        return full.clone()
    shard = full.new_zeros(sharding.local_shape)
    for part in sharding.slices(rank):
        wanted = full.narrow(sharding.dim, part.full_start, part.length)
        shard.narrow(sharding.dim, part.local_start, part.length).copy_(wanted)
    return shard


def gather_full(shard: Tensor, sharding: Sharding | None) -> Tensor:
    """The full parameter, on every rank of the sharding's mesh, as a new tensor. None stands for replicated."""
    shard = shard.detach()
    if sharding is None or sharding.dim is None:
        return shard.clone()
    if sharding.mesh.size() == 1:
        every: Tensor = shard[None]
    else:
        every = start_all_gather(shard[None], sharding.mesh, 0).wait()
    full = shard.new_zeros(sharding.full_shape)
    for rank in range(0, sharding.mesh.size(), sharding.replicas):
        for part in sharding.slices(rank):
            held = every[rank].narrow(sharding.dim, part.local_start, part.length)
            full.narrow(sharding.dim, part.full_start, part.length).copy_(held)
    return full


def sharded_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Sharding | None]]:
    """Every parameter once, with its first name and its sharding (None: replicated)."""
    declared = shardings(module)
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False) if name in declared}
    for name, parameter in module.named_parameters():
        yield name, parameter, declared.get(names.get(id(parameter), name))


def replicated(mesh: DeviceMesh, shape: torch.Size | tuple[int, ...], *, partial_gradient: bool = False) -> Sharding:
    """The declaration of a parameter that every rank of `mesh` holds whole."""
    return Sharding(Replicate(), mesh, tuple(shape), partial_gradient=partial_gradient)
