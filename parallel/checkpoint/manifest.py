"""The manifest of a checkpoint: which tensors it holds, which piece of each lies where, and the checksum of everything.

A manifest may come from anywhere, so nothing in it is believed: types, ranges, file names and sums are checked before
anything is opened or allocated. It is plain JSON, which cannot name code, and it carries a checksum of itself.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from weft.parallel.checkpoint.boxes import Box, tiles, whole
from weft.parallel.checkpoint.errors import CheckpointError
from weft.parallel.checkpoint.files import looks_pickled, read_regular

FORMAT: Final = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**29
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
MOST_CUT_DIMS, MOST_COMPARED = 8, 300
_SELF_CHECK = re.compile(rb'\A\{\n "crc32": "([0-9a-f]{8})",')
_NO_CHECKSUM = "00000000"

Size = Annotated[int, Field(ge=0, lt=2**62)]
Sizes = Annotated[tuple[Size, ...], Field(strict=False, max_length=16)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
TensorName = Annotated[str, Field(max_length=500)]
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,7}\.safetensors$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Record):
    """Size and CRC-32 of a whole file."""

    bytes: Size
    crc32: Checksum


class PieceRecord(_Record):
    """One block of a tensor: `bytes` from `begin` on in `file`, entries in row-major order, and their CRC-32."""

    file: FileName
    begin: Size
    bytes: Size
    offset: Sizes
    shape: Sizes
    crc32: Checksum

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


class TensorRecord(_Record):
    """A tensor and the pieces that make it up."""

    shape: Sizes
    dtype: str
    pieces: tuple[PieceRecord, ...] = Field(strict=False)

    def problem(self, files: Mapping[str, FileRecord]) -> str | None:
        """Why the pieces cannot be those of the tensor; None when they can."""
        if self.dtype not in ITEM_BYTES:
            return f"has the unknown dtype {self.dtype[:20]!r}"
        for piece in self.pieces:
            if len(piece.offset) != len(self.shape) or len(piece.shape) != len(self.shape):
                return f"has a piece of other dims in {piece.file}"
            ends = (start + length for start, length in zip(piece.offset, piece.shape, strict=True))
            size = prod(piece.shape)
            if size and any(end > most for end, most in zip(ends, self.shape, strict=True)):
                return f"has a piece beyond its shape in {piece.file}"
            if piece.bytes != size * ITEM_BYTES[self.dtype]:
                return f"has a piece whose bytes are not those of its shape in {piece.file}"
            if piece.file not in files:
                return f"has a piece in {piece.file}, which is not listed"
            if piece.begin + piece.bytes > files[piece.file].bytes:
                return f"has a piece beyond the end of {piece.file}"
        return self._untiled()

    def _untiled(self) -> str | None:
        """Where the pieces leave out entries, or have some twice."""
        dims = range(len(self.shape))
        if sum(any(piece.shape[dim] != self.shape[dim] for piece in self.pieces) for dim in dims) > MOST_CUT_DIMS:
            return f"is cut along more than {MOST_CUT_DIMS} dims"
        if tiles(whole(self.shape), [piece.box for piece in self.pieces]):
            return None
        some = self.pieces[:MOST_COMPARED]  # a hostile manifest has no say in how long the search takes
        for one, other in combinations(some, 2):
            if one.box.overlap(other.box) is not None:
                return f"has pieces that overlap in {' and '.join(sorted({one.file, other.file}))}"
        files = sorted({piece.file for piece in self.pieces})
        return f"has pieces that leave some of it out in {files[0] if files else 'every file'}"


class Manifest(_Record):
    """All that a checkpoint says of itself; `metadata` is the run's own (step, settings, …)."""

    crc32: Checksum = _NO_CHECKSUM
    format: Literal[2] = FORMAT
    metadata: dict[str, JsonValue]
    files: dict[FileName, FileRecord]
    tensors: dict[TensorName, TensorRecord]

    @model_validator(mode="after")
    def _check_tensors(self) -> Self:
        ends: dict[str, list[tuple[int, int, str]]] = {file: [] for file in self.files}
        for name, tensor in self.tensors.items():
            if problem := tensor.problem(self.files):
                raise ValueError(f"tensor {name[:100]} {problem}")
            for piece in tensor.pieces:
                ends[piece.file].append((piece.begin, piece.begin + piece.bytes, name))
        for file, ranges in ends.items():
            for (_, end, _), (start, _, name) in pairwise(sorted(ranges)):
                if start < end:
                    raise ValueError(f"tensor {name[:100]} has a piece in {file} that overlaps another one there")
        return self

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; opens nothing else.

    Raises:
        CheckpointError: there is none, it is damaged, or what it says cannot be.
    """
    path = directory / MANIFEST
    try:
        data, names = read_regular(path, LARGEST_MANIFEST), sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); choose another checkpoint") from None
    found = _SELF_CHECK.match(data)
    if found is None:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}; choose another checkpoint")
    if f"{zlib.crc32(_without_checksum(data)):08x}".encode() != found[1]:
        raise CheckpointError(f"{path} is damaged: its checksum is not its own; choose another checkpoint")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not to be trusted ({_first(error)}); choose another checkpoint") from None
    pickled = next((n for n in names if n not in manifest.files and looks_pickled(directory / n)), None)
    if pickled is not None:
        raise CheckpointError(f"{directory / pickled} is a pickle, which weft never writes; choose another checkpoint")
    return manifest


def manifest_text(metadata: Mapping[str, Any], files: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    """The manifest as JSON, a line for each file and piece, with its own checksum in the first line."""
    lines = ["{", f' "crc32": "{_NO_CHECKSUM}",', f' "format": {FORMAT},']
    indented = json.dumps(metadata, indent=1, ensure_ascii=False, allow_nan=False).replace("\n", "\n ")
    lines.append(f' "metadata": {indented},')
    lines.append(f' "files": {_rows(files, indent=2)},')
    entries = ",\n".join(
        f'  {json.dumps(name)}: {{"shape": {json.dumps(tensor["shape"])}, "dtype": {json.dumps(tensor["dtype"])}, '
        f'"pieces": [\n' + ",\n".join(f"   {json.dumps(piece)}" for piece in tensor["pieces"]) + "]}"
        for name, tensor in tensors.items()
    )
    lines.append(f' "tensors": {{\n{entries}}}')
    data = ("\n".join(lines) + "\n}\n").encode()
    return data.replace(_NO_CHECKSUM.encode(), f"{zlib.crc32(data):08x}".encode(), 1)


def _rows(records: Mapping[str, Any], *, indent: int) -> str:
    rows = ",\n".join(f"{' ' * indent}{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
    return f"{{\n{rows}}}"


def _without_checksum(data: bytes) -> bytes:
    start = len(b'{\n "crc32": "')
    return data[:start] + _NO_CHECKSUM.encode() + data[start + len(_NO_CHECKSUM) :]


def _first(error: ValidationError) -> str:
    """The first problem, shortened: a hostile manifest has no say in how long the sentence is."""
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:60] for part in detail["loc"])[:120]
    words = " ".join(detail["msg"].removeprefix("Value error, ").split())[:240]
    return f"{where}: {words}" if where else words
