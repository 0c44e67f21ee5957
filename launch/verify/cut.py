"""Which part of a full tensor a rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.sharding import Sharding, Slice


class Place(NamedTuple):
    """Where a rank stands on the mesh, and the sizes of its axes."""

    data: int
    tensor: int
    pipeline: int
    data_size: int
    tensor_size: int


@dataclass(frozen=True)
class Cut:
    """The entries along `dim` that a rank holds; `dim` None: all of them. `replicas` ranks hold the same ones."""

    dim: int | None = None
    slices: tuple[Slice, ...] = ()
    replicas: int = 1

    def of_full(self, full: Tensor) -> Tensor:
        """The rank's part of the full tensor, without padding."""
        if self.dim is None:
            return full
        parts = [full.narrow(self.dim, part.full_start, part.length) for part in self.slices]
        return torch.cat(parts, self.dim) if parts else full.narrow(self.dim, 0, 0)

    def of_local(self, local: Tensor) -> Tensor:
        """What the rank's tensor holds of the full one, without padding."""
        if self.dim is None:
            return local
        parts = [local.narrow(self.dim, part.local_start, part.length) for part in self.slices]
        return torch.cat(parts, self.dim) if parts else local.narrow(self.dim, 0, 0)

    def write(self, local: Tensor, full: Tensor) -> None:
        """Put the rank's part of the full tensor into its own."""
        if self.dim is None:
            local.copy_(full)
            return
        for part in self.slices:
            source = full.narrow(self.dim, part.full_start, part.length)
            local.narrow(self.dim, part.local_start, part.length).copy_(source)


def parameter_cut(
    name: str, local: Sequence[int], full: Sequence[int], sharding: Sharding | None, tensor: DeviceMesh
) -> Cut:
    """How a parameter is cut: as declared, or, when nothing is declared, equally along the one dim that is shorter.

    Raises:
        ValueError: the shapes fit no such cut.
    """
    if sharding is not None and tuple(sharding.full_shape) != tuple(full):
        raise ValueError(
            f"{name} declares the full shape {list(sharding.full_shape)}, but is {list(full)} in the plain model"
        )
    if sharding is not None and sharding.dim is not None:
        return Cut(sharding.dim, tuple(sharding.slices()), sharding.replicas)
    shorter = [dim for dim, (own, whole) in enumerate(zip(local, full, strict=False)) if own != whole]
    if not shorter and len(local) == len(full):
        return Cut()
    if len(shorter) == 1 and len(local) == len(full) and local[shorter[0]] * tensor.size() == full[shorter[0]]:
        length = local[shorter[0]]
        return Cut(shorter[0], (Slice(tensor.get_local_rank() * length, 0, length),))
    raise ValueError(
        f"{name} is {list(local)} on each of {tensor.size()} tensor ranks and {list(full)} in the plain model; declare "
        "in its module's `shardings` how it is cut"
    )


def aligned(plain: Tensor, local: Tensor, place: Place, columns: Cut | None) -> tuple[Tensor, Tensor] | None:
    """What a rank should hold of an activation, and what it holds; None when the shapes do not tell.

    A dim that is shorter than the plain one is the rank's part of it: of the batch over data ranks, of anything else
    over tensor ranks. `columns` says how the last dim is cut, where a layer has declared it. A scalar of a part of the
    batch is compared with nothing.
    """
    if plain.dim() != local.dim() or (plain.dim() == 0 and place.data_size > 1):
        return None
    data_left = place.data_size > 1
    last = plain.dim() - 1
    for dim in range(plain.dim()):
        own, whole = local.shape[dim], plain.shape[dim]
        if own == whole:
            continue
        if data_left and own * place.data_size == whole:
            plain, data_left = plain.narrow(dim, place.data * own, own), False
        elif dim == last and columns is not None:
            plain, local = columns.of_full(plain), columns.of_local(local)
        elif own == -(-whole // place.tensor_size):  # the last parts may end in padding
            start = min(place.tensor * own, whole)
            length = min(own, whole - start)
            plain, local = plain.narrow(dim, start, length), local.narrow(dim, 0, length)
        else:
            return None
    return plain, local
