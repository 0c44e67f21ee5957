"""The file that a rank writes: safetensors, with the CRC-32 of every piece, read back from disk before it counts.

The layout of a safetensors file is a length, a JSON header and the tensors' bytes. It is written here from pieces, one
by one or put together in memory before, because the library wants a copy of the whole file, and read by offset instead
of through a memory map, in which a failing disk would kill the process.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32, crc32_combine

from weft.parallel.checkpoint.boxes import Box
from weft.parallel.checkpoint.direct import chunks_of, gathered, leave_cache
from weft.parallel.checkpoint.errors import CheckpointError
from weft.parallel.checkpoint.files import check_safetensors, checksum_of, create, open_regular, read_into, write_all
from weft.parallel.checkpoint.manifest import ITEM_BYTES, Manifest, PieceRecord

_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class NamedPiece(Protocol):
    """What is written as one: a block of the tensor `name`."""

    @property
    def name(self) -> str: ...
    @property
    def full_shape(self) -> tuple[int, ...]: ...
    @property
    def box(self) -> Box: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> Tensor:
        """The block, in host memory."""
        ...


PieceType = TypeVar("PieceType", bound=NamedPiece)


class Shard(NamedTuple, Generic[PieceType]):
    """What the file of a rank is to be.

    Attributes:
        header: the file's beginning.
        pieces: what follows it, in this order.
        bounds: where in the file each piece begins, and where the last one ends.
    """

    header: bytes
    pieces: list[PieceType]
    bounds: list[int]

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return self.bounds[-1]


def lay_out(pieces: Sequence[PieceType]) -> Shard[PieceType]:
    """The file of these pieces; those of larger entries go first, so that every entry is aligned in it.

    Raises:
        ValueError: their dtype cannot be saved.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header = _header(ordered)
    return Shard(header, ordered, list(accumulate(map(_size, ordered), initial=len(header))))


def write_shard(path: Path, shard: Shard[PieceType], image: memoryview | None = None) -> dict[str, Any]:
    """Write a shard, bring it to disk, and read it back; returns `files` and `tensors` as the manifest has them.

    Args:
        image: the bytes of the whole file, from the beginning of a page on; without it the pieces are read one by one.

    Raises:
        OSError: the file cannot be written, or is not on disk what was written.
    """
    checksums: list[int] = []  # of the header and of each piece: the file's own follows from them
    if image is None:
        parts = chain([memoryview(shard.header)], (_bytes_of(piece.read()) for piece in shard.pieces))
        _write(path, gathered(_summed(parts, checksums)))
    else:
        checksums = [crc32(image[begin:end]) for begin, end in pairwise([0, *shard.bounds])]
        _write(path, chunks_of(image))
    checksum = 0
    for own, (begin, end) in zip(checksums, pairwise([0, *shard.bounds]), strict=True):
        checksum = crc32_combine(checksum, own, end - begin)
    if checksum_of(path, from_disk=True) != checksum:
        raise OSError(f"{path.name} is not on disk what was written")
    tensors: dict[str, Any] = {}
    for piece, begin, own in zip(shard.pieces, shard.bounds[:-1], checksums[1:], strict=True):
        tensors.setdefault(piece.name, _description(piece))["pieces"].append(_record(piece, path.name, begin, own))
    return {"files": {path.name: {"bytes": shard.bytes, "crc32": f"{checksum:08x}"}}, "tensors": tensors}


def _write(path: Path, chunks: Iterable[memoryview]) -> None:
    descriptor = create(path)
    try:
        leave_cache(descriptor)
        for chunk in chunks:
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _summed(parts: Iterable[memoryview], checksums: list[int]) -> Iterator[memoryview]:
    """The parts, whose checksums are put down as they pass."""
    for part in parts:
        checksums.append(crc32(part))
        yield part


class PieceReader:
    """Reads pieces, each checked by its own checksum; `bytes_read` counts."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.bytes_read = 0
        self._directory, self._manifest = directory, manifest
        self._open: tuple[str, int] | None = None
        self._latest: tuple[PieceRecord, Tensor] | None = None

    def read(self, tensor: str, piece: PieceRecord) -> Tensor:
        """The piece as a tensor of its shape, which is not to be changed: the latest one is kept.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if self._latest is None or self._latest[0] is not piece:
            self._latest = (piece, self._read(tensor, piece))
        return self._latest[1]

    def _read(self, tensor: str, piece: PieceRecord) -> Tensor:
        data = bytearray(piece.bytes)
        path = self._directory / piece.file
        try:
            read_into(self._descriptor(piece.file), data, piece.begin)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror or error}); choose another checkpoint"
            ) from None
        self.bytes_read += len(data)
        if f"{crc32(data):08x}" != piece.crc32:
            raise CheckpointError(
                f"{path} is damaged: the checksum of {tensor} is not the manifest's; choose another checkpoint"
            )
        dtype = getattr(torch, self._manifest.tensors[tensor].dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(piece.shape)

    def _descriptor(self, file: str) -> int:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        self.close()
        descriptor = open_regular(self._directory / file)
        self._open = (file, descriptor)
        if os.fstat(descriptor).st_size != self._manifest.files[file].bytes:
            raise OSError("its size is not the manifest's")
        check_safetensors(descriptor)
        return descriptor

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _header(pieces: Sequence[NamedPiece]) -> bytes:
    """The beginning of the file."""
    entries: dict[str, Any] = {}
    offset = 0
    for key, piece in zip(_keys(pieces), pieces, strict=True):
        end = offset + _size(piece)
        dtype = _SAFETENSORS_DTYPES[_name(piece.dtype)]
        entries[key] = {"dtype": dtype, "shape": piece.box.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _keys(pieces: Sequence[NamedPiece]) -> Iterator[str]:
    """The tensor's name; where a file has several pieces of it, with the piece's number."""
    counts, numbers = Counter(piece.name for piece in pieces), Counter[str]()
    for piece in pieces:
        yield piece.name if counts[piece.name] == 1 else f"{piece.name}#{numbers[piece.name]}"
        numbers[piece.name] += 1


def _record(piece: NamedPiece, file: str, begin: int, checksum: int) -> dict[str, Any]:
    return {
        "file": file,
        "begin": begin,
        "bytes": _size(piece),
        "offset": list(piece.box.offset),
        "shape": list(piece.box.shape),
        "crc32": f"{checksum:08x}",
    }


def _description(piece: NamedPiece) -> dict[str, Any]:
    return {"shape": list(piece.full_shape), "dtype": _name(piece.dtype), "pieces": []}


def _size(piece: NamedPiece) -> int:
    """Of a piece, in bytes."""
    return piece.box.size * piece.dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ValueError(f"tensors of dtype {name} cannot be saved; choose one of {', '.join(ITEM_BYTES)}")
    return name


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
