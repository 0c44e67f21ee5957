"""Loading: each rank reads the pieces that overlap its own blocks, one piece at a time, whatever layout wrote them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.checkpoint.boxes import Box
from weft.parallel.checkpoint.entry import Entry, padded
from weft.parallel.checkpoint.errors import CheckpointError, OtherModelError
from weft.parallel.checkpoint.keys import listed
from weft.parallel.checkpoint.manifest import Manifest, PieceRecord, read_manifest
from weft.parallel.checkpoint.shard_file import PieceReader

Result = TypeVar("Result")


class _Names(NamedTuple):
    """What a rank finds wrong with the names, and the names that it asks for."""

    asked: frozenset[str]
    missing: frozenset[str]
    misshapen: frozenset[str]


@torch.no_grad()
def load_checkpoint(directory: Path, entries: Iterable[Entry], *, only: str = "") -> int:
    """Fill the tensors of the entries from a checkpoint of any layout; returns the bytes that this rank has read.

    A collective call of all ranks, where there are several: all succeed, or all raise the same error. A tensor takes
    the stored values in its own dtype. At most one piece, 1/16 of a stored shard or 256 KiB, is held beside them.

    Args:
        only: the beginning of the names that count, such as `model/` for weights without optimiser state.

    Raises:
        OtherModelError: tensors are missing, unexpected or of another shape; all of them are named, none is filled.
        CheckpointError: a file is missing or damaged; the tensors may be filled in part.
    """
    held = list(entries)
    manifest = together(lambda: read_manifest(directory))
    _check_names(directory, manifest, held, only)
    with PieceReader(directory, manifest) as reader:
        together(lambda: _fill(manifest, held, reader))
    return reader.bytes_read


def read_block(reader: PieceReader, manifest: Manifest, name: str, wanted: Box) -> Tensor:
    """One block of a stored tensor, in its own dtype, in host memory.

    Raises:
        CheckpointError: a file is damaged.
    """
    record = manifest.tensors[name]
    block = torch.empty(wanted.shape, dtype=getattr(torch, record.dtype))
    for piece in record.pieces:
        if _meet(piece, wanted):
            _copy(reader.read(name, piece), piece.box, block, wanted)
    return block


def together(action: Callable[[], Result]) -> Result:
    """Do it on every rank; when it fails on one, all raise what the first of them says.

    Raises:
        CheckpointError: it failed on some rank.
    """
    problem, result = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    for found in _from_all(problem):
        if found is not None:
            raise CheckpointError(found)
    return result  # type: ignore[return-value]  # without a problem the action has returned


def _from_all(value: Result) -> list[Result]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Result] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _check_names(directory: Path, manifest: Manifest, entries: Sequence[Entry], only: str) -> None:
    shapes = {name: record.shape for name, record in manifest.tensors.items() if name.startswith(only)}
    asked = {entry.name: entry.full_shape for entry in entries}
    differ = {name for name, shape in asked.items() if name in shapes and shapes[name] != shape}
    words = {f"{name} is {list(shapes[name])} there and {list(asked[name])} here" for name in differ}
    found = _from_all(_Names(frozenset(asked), frozenset(asked.keys() - shapes.keys()), frozenset(words)))
    unexpected = shapes.keys() - frozenset().union(*(names.asked for names in found))
    problems = [
        f"it lacks {listed(missing)}" if (missing := frozenset().union(*(names.missing for names in found))) else "",
        f"it has {listed(unexpected)}, which this model has not" if unexpected else "",
        *sorted(frozenset().union(*(names.misshapen for names in found))),
    ]
    if any(problems):
        raise OtherModelError(f"{directory} is of another model: {'; '.join(filter(None, problems))}")


def _fill(manifest: Manifest, entries: Sequence[Entry], reader: PieceReader) -> None:
    targets: dict[str, list[tuple[Box, Tensor]]] = {}
    for entry in entries:
        if padded(entry):
            entry.tensor.detach().zero_()
        targets.setdefault(entry.name, []).extend(entry.blocks())
    pieces = [
        (piece, name)
        for name, blocks in targets.items()
        for piece in manifest.tensors[name].pieces
        if any(_meet(piece, box) for box, _ in blocks)
    ]
    for piece, name in sorted(pieces, key=lambda pair: (pair[0].file, pair[0].begin)):
        stored = reader.read(name, piece)
        for box, view in targets[name]:
            _copy(stored, piece.box, view, box)


def _meet(piece: PieceRecord, wanted: Box) -> bool:
    return bool(piece.bytes) and piece.box.overlap(wanted) is not None


def _copy(stored: Tensor, box: Box, target: Tensor, wanted: Box) -> None:
    """Copy what the stored box and the wanted one have in common."""
    common = box.overlap(wanted)
    if common is not None:
        target[common.inside(wanted)].copy_(stored[common.inside(box)])
