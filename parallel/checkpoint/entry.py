"""What a rank holds of each tensor of a checkpoint, as blocks of the full tensor beside views of its own memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.checkpoint.boxes import Box, Shape, flat_run, whole
from weft.parallel.sharding import Sharding

SMALLEST_PIECE = 256 * 1024
MOST_PIECES = 16


class FlatPart(NamedTuple):
    """A run of a flattened local shard: the shard's shape, and where in it the run begins."""

    shape: Shape
    start: int


@dataclass(frozen=True)
class Entry:
    """One tensor of this rank: its name in every layout, and how it is split.

    Attributes:
        name: `KIND/PARAMETER`, such as `model/layers.0.mlp.down_proj.weight` or `exp_avg/norm.weight`.
        tensor: the local shard; with `part`, that run of it, `[entries]`.
        sharding: over the tensor axis, as the module declares it; None: every tensor rank holds it whole.
        shared: another pipeline stage stores it; it is loaded here but not saved.
        part: this data rank alone holds the run (ZeRO); None: every data rank holds the whole shard.
    """

    name: str
    tensor: Tensor
    sharding: Sharding | None = None
    shared: bool = False
    part: FlatPart | None = None

    @property
    def full_shape(self) -> Shape:
        """Shape of the full tensor, without padding."""
        return self._local_shape if self.sharding is None else tuple(self.sharding.full_shape)

    @property
    def _local_shape(self) -> Shape:
        return tuple(self.tensor.shape) if self.part is None else self.part.shape

    def blocks(self) -> Iterator[tuple[Box, Tensor]]:
        """The blocks of the full tensor that stand here, each with the view of `tensor` that holds it."""
        for local, view in self._local_blocks():
            if self.sharding is None or self.sharding.dim is None:
                yield local, view
                continue
            dim, held = self.sharding.dim, whole(self._local_shape)
            for part in self.sharding.slices():
                shape = (*held.shape[:dim], part.length, *held.shape[dim + 1 :])
                common = local.overlap(Box(held.offset, shape).moved(dim, part.local_start))
                if common is not None:
                    yield common.moved(dim, part.full_start - part.local_start), view[common.inside(local)]

    def _local_blocks(self) -> Iterator[tuple[Box, Tensor]]:
        tensor = self.tensor.detach()
        if self.part is None:
            yield whole(self._local_shape), tensor
            return
        taken = 0
        for box in flat_run(self.part.shape, self.part.start, self.part.start + tensor.numel()):
            yield box, tensor[taken : taken + box.size].view(box.shape)
            taken += box.size


class Piece(NamedTuple):
    """What is written as one: a block of an entry, and the view that holds it."""

    entry: Entry
    box: Box
    view: Tensor

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def full_shape(self) -> Shape:
        return self.entry.full_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def bytes(self) -> int:
        return self.box.size * self.view.element_size()

    def read(self) -> Tensor:
        """The block, in host memory."""
        return self.view.cpu()


def own_pieces(entries: Iterator[Entry] | list[Entry], mesh: DeviceMesh) -> list[Piece]:
    """The pieces that this rank writes: each block of the model is some rank's, and the data replicas share the work.

    A piece is 1/16 of a block, or 256 KiB where that is more: the least that is read and checked at once.
    """
    common: list[Piece] = []
    own: list[Piece] = []
    tensor, context, data = (mesh[axis] for axis in ("tensor", "context", "data"))  # which takes 40 µs an axis
    for entry in entries:
        if not _is_stored_here(entry, tensor):
            continue
        pieces = [piece for box, view in entry.blocks() for piece in _cut(entry, box, view)]
        if entry.part is None:
            common += pieces
        elif context.get_local_rank() == 0:
            own += pieces
    replica = data.get_local_rank() * context.size() + context.get_local_rank()
    return own + _share(common, replica, data.size() * context.size())


def _is_stored_here(entry: Entry, tensor: DeviceMesh) -> bool:
    if entry.shared:
        return False
    if entry.sharding is None or entry.sharding.dim is None:
        return tensor.get_local_rank() == 0
    return entry.sharding.mesh.get_local_rank() % entry.sharding.replicas == 0


def _cut(entry: Entry, box: Box, view: Tensor) -> list[Piece]:
    if not box.shape:
        return [Piece(entry, box, view)]
    parts = 1
    while parts < MOST_PIECES and view.numel() * view.element_size() > parts * SMALLEST_PIECE:
        parts *= 2
    dim = entry.sharding.dim if entry.sharding is not None and entry.sharding.dim is not None else 0
    if entry.part is not None:
        dim = max(range(len(box.shape)), key=lambda d: (box.shape[d], -d))
    return [Piece(entry, part, view[part.inside(box)]) for part in box.cut(dim, parts)]


def _share(pieces: list[Piece], replica: int, replicas: int) -> list[Piece]:
    """Every `replicas`-th share of the bytes, in order; all replicas cut alike, so nobody has to be asked."""
    total, before, share = sum(piece.bytes for piece in pieces), 0, []
    for piece in pieces:
        if min((2 * before + piece.bytes) * replicas // (2 * total or 1), replicas - 1) == replica:
            share.append(piece)
        before += piece.bytes
    return share


def padded(entry: Entry) -> bool:
    """Whether the tensor has entries that are not part of the full one."""
    held = sum(box.size for box, _ in entry.blocks())
    return held < prod(entry.tensor.shape)
