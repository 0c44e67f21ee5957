"""Checkpoints that any layout can load: shards in safetensors files, and a manifest that says which part is where.

A checkpoint is a directory. Each writing rank has one safetensors file with its shards as they are; `manifest.json`
lists, for every tensor, its full shape and the pieces that make it up. A loading rank reads only the overlap of its own
shards with those pieces. Nothing is pickled; nothing loaded can run code.

A save is atomic: files are written into a directory beside, synced, and renamed last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.sharding import Sharding, Slice

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or not of this model; the message names file or tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of this rank: its name in every layout, the local tensor, and how it is split (None: replicated).

    `shared`: another pipeline stage stores it; it is loaded here but not saved.
    """

    name: str
    tensor: Tensor
    sharding: Sharding | None
    shared: bool = False


def save_checkpoint(directory: Path, entries: Iterable[Entry], metadata: Mapping[str, Any], mesh: DeviceMesh) -> None:
    """Write a checkpoint. A collective call of all ranks of `mesh`; the first data replica writes.

    `metadata`: JSON values, kept in the manifest. An existing checkpoint of that name is replaced.

    Raises:
        OSError: a file cannot be written; what was there before is untouched.
    """
    work = directory.with_name(f".{directory.name}.part")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    pieces: dict[str, Any] = {}
    if mesh["data"].get_local_rank() == 0:
        held = [entry for entry in entries if _is_stored_here(entry, mesh["tensor"])]
        pieces = _write_file(work, f"rank-{rank:05d}.safetensors", held)
    gathered: list[Any] = [None] * dist.get_world_size() if rank == 0 else []
    dist.gather_object(pieces, gathered if rank == 0 else None)
    if rank == 0:
        manifest = {"format": FORMAT, "metadata": metadata} | _merge(gathered)
        _write_synced(work / MANIFEST, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(directory, ignore_errors=True)
        work.rename(directory)
        _sync_directory(directory.parent)
    dist.barrier()


def read_metadata(directory: Path) -> dict[str, Any]:
    """The metadata that was saved with a checkpoint.

    Raises:
        CheckpointError: there is no readable manifest of this format.
    """
    metadata: dict[str, Any] = _read_manifest(directory)["metadata"]
    return metadata


@torch.no_grad()
def load_checkpoint(directory: Path, entries: Sequence[Entry]) -> None:
    """Fill the local tensors from a checkpoint of any layout. Every rank calls it; no communication.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing or of another shape.
    """
    manifest = _read_manifest(directory)
    _check_names(directory, manifest, entries)
    needed = {piece["file"] for entry in entries for piece in manifest["tensors"][entry.name]["pieces"]}
    for file in sorted(needed):
        _check_file(directory / file, manifest["files"][file])
    for entry in entries:
        entry.tensor.zero_()
        for piece in manifest["tensors"][entry.name]["pieces"]:
            _copy_overlap(directory / piece["file"], entry, piece)


def _is_stored_here(entry: Entry, tensor: DeviceMesh) -> bool:
    if entry.shared:
        return False
    if entry.sharding is None or entry.sharding.dim is None:
        return tensor.get_local_rank() == 0
    return entry.sharding.mesh.get_local_rank() % entry.sharding.replicas == 0


def _write_file(work: Path, file: str, entries: Sequence[Entry]) -> dict[str, Any]:
    path = work / file
    save_file({entry.name: entry.tensor.detach().cpu().contiguous() for entry in entries}, path)
    with path.open("rb+") as written:
        os.fsync(written.fileno())
    return {
        "files": {file: {"bytes": path.stat().st_size, "sha256": _sha256(path)}},
        "tensors": {entry.name: _describe(entry, file) for entry in entries},
    }


def _describe(entry: Entry, file: str) -> dict[str, Any]:
    sharding = entry.sharding
    whole = sharding is None or sharding.dim is None
    shape = list(entry.tensor.shape) if sharding is None else list(sharding.full_shape)
    slices = None if sharding is None or whole else [list(part) for part in sharding.slices()]
    piece = {"file": file, "dim": None if sharding is None else sharding.dim, "slices": slices}
    return {"shape": shape, "dtype": str(entry.tensor.dtype).removeprefix("torch."), "pieces": [piece]}


def _merge(gathered: Iterable[dict[str, Any]]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in gathered:
        files |= part.get("files", {})
        for name, description in part.get("tensors", {}).items():
            if name in tensors:
                tensors[name]["pieces"] += description["pieces"]
            else:
                tensors[name] = description
    return {"files": files, "tensors": tensors}


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); choose another checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}; choose another checkpoint")
    return manifest


def _check_names(directory: Path, manifest: dict[str, Any], entries: Sequence[Entry]) -> None:
    missing = [entry.name for entry in entries if entry.name not in manifest["tensors"]]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:5])}; it is a checkpoint of another model")
    for entry in entries:
        wanted = list(entry.tensor.shape if entry.sharding is None else entry.sharding.full_shape)
        stored = manifest["tensors"][entry.name]["shape"]
        if stored != wanted:
            raise CheckpointError(f"{directory}: {entry.name} is {stored} there and {wanted} in this model")


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; choose another checkpoint")
    if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its size or checksum is not the manifest's; choose another checkpoint"
        )


def _copy_overlap(path: Path, entry: Entry, piece: Mapping[str, Any]) -> None:
    """Copy what the piece and this rank's shard have in common, reading no more than that."""
    sharding, dim = entry.sharding, piece["dim"]
    with safe_open(path, framework="pt") as file:
        if sharding is None or sharding.dim is None:
            entry.tensor.copy_(file.get_tensor(entry.name))
            return
        stored = file.get_slice(entry.name)
        parts = [Slice(*part) for part in piece["slices"]] if dim is not None else None
        for own in sharding.slices():
            for part in parts or [Slice(0, 0, sharding.full_shape[sharding.dim])]:
                start, stop = max(own.full_start, part.full_start), min(_end(own), _end(part))
                if start < stop:
                    index = [slice(None)] * sharding.dim
                    index.append(
                        slice(start - part.full_start + part.local_start, stop - part.full_start + part.local_start)
                    )
                    target = entry.tensor.narrow(sharding.dim, start - own.full_start + own.local_start, stop - start)
                    target.copy_(stored[tuple(index)])


def _end(part: Slice) -> int:
    return part.full_start + part.length


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
