"""Writing safetensors shards as Hugging Face has them, one tensor in memory at a time."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.parallel.tensor.load import INDEX, SINGLE

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Outgoing(NamedTuple):
    """A tensor to be written: what is known before it is read, and how it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(directory: Path, tensors: Sequence[Outgoing], *, shard_bytes: int) -> None:
    """Write `model.safetensors`, or parts of at most `shard_bytes` (but for larger tensors) and their index.

    Raises:
        OSError: a file cannot be written.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        _write(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(directory / file, shard)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
    total = {"total_size": sum(tensor.bytes for tensor in tensors)}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Outgoing], shard_bytes: int) -> Iterator[list[Outgoing]]:
    shard: list[Outgoing] = []
    for tensor in tensors:
        if shard and sum(held.bytes for held in shard) + tensor.bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(path: Path, tensors: Sequence[Outgoing]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = tensor.read().to(tensor.dtype).contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
