"""Saving: every rank writes its pieces into a file of its own, at once or in the background; rank 0 makes it count."""

import os
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.checkpoint.direct import KeptMemory
from weft.parallel.checkpoint.entry import Entry, Piece, own_pieces
from weft.parallel.checkpoint.errors import CheckpointError, SaveError
from weft.parallel.checkpoint.files import publish, remove_strangers, work_directory, write_synced
from weft.parallel.checkpoint.manifest import MANIFEST, manifest_text, read_manifest
from weft.parallel.checkpoint.shard_file import Shard, lay_out, write_shard

_BACKGROUND_NICENESS = 10
Part = dict[str, Any]
_PATIENCE = 2.0  # seconds between two looks at whether all ranks have written


def save_checkpoint(directory: Path, entries: Iterable[Entry], metadata: Mapping[str, Any], mesh: DeviceMesh) -> None:
    """Write a checkpoint. A collective call of all ranks of `mesh`, which share the directory.

    `metadata`: JSON values, kept in the manifest. An existing checkpoint of that name is replaced.

    Raises:
        SaveError: a file cannot be written; what was there before is untouched.
    """
    Save(directory, entries, metadata, mesh).finish()


class Save:
    """A checkpoint that a thread of each rank writes; nobody sees it before `finish` has put it in its place.

    Making one communicates nothing.

    Args:
        memory: what this rank writes, its share of the model and of the optimiser, is copied there, and training may go
            on at once. Without it the tensors must stay as they are till the end.
    """

    def __init__(
        self,
        directory: Path,
        entries: Iterable[Entry],
        metadata: Mapping[str, Any],
        mesh: DeviceMesh,
        *,
        memory: KeptMemory | None = None,
    ) -> None:
        self.directory = directory
        self._metadata = dict(metadata)
        self._work = work_directory(directory)
        self._written: Part = {"files": {}, "tensors": {}}
        self._error: str | None = "the thread that writes it ended too early"
        self._device, self._rank = mesh.device_type, dist.get_rank()
        shard = lay_out(own_pieces(list(entries), mesh))
        image = None if memory is None else _image(shard, memory.take(shard.bytes))
        self._thread = threading.Thread(target=self._write, args=(shard, image, memory), daemon=True)
        self._thread.start()

    def written(self, wait: float = 0.0) -> bool:
        """Whether this rank's part is on disk, or has failed; waits so many seconds for it at most."""
        self._thread.join(wait)
        return not self._thread.is_alive()

    def writing_anywhere(self, wait: float = 0.0) -> bool:
        """Whether some rank still writes its part; each waits so many seconds for its own. A collective call."""
        writing = torch.tensor([not self.written(wait)], dtype=torch.int32, device=self._device)
        dist.all_reduce(writing, dist.ReduceOp.MAX)
        return bool(writing)

    def finish(self) -> None:
        """Wait for all ranks' parts, and put the checkpoint in its place. A collective call.

        Raises:
            SaveError: some rank could not write; what was there before is untouched. Raised on all ranks.
        """
        while self.writing_anywhere(_PATIENCE):
            pass  # however slow the disk, no communication lasts longer than its time limit
        rank, size = self._rank, dist.get_world_size()
        own = (self._written, self._error)
        gathered: list[Any] = [own] * size if rank == 0 else []
        dist.gather_object(own, gathered if rank == 0 else None)
        outcome: list[str | None] = [_assembled(self.directory, self._metadata, gathered) if rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise SaveError(outcome[0])

    def _write(self, shard: Shard[Piece], image: memoryview | None, memory: KeptMemory | None) -> None:
        try:
            if image is not None and sys.platform == "linux":  # where a priority is a thread's own: training goes first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
            self._work.mkdir(parents=True, exist_ok=True)
            if shard.pieces:
                self._written = write_shard(self._work / f"rank-{self._rank:05d}.safetensors", shard, image)
            self._error = None
        except Exception as error:  # of whatever kind: the ranks must not count a part that is not there
            self._error = _words(error)
        finally:
            if memory is not None and image is not None:
                memory.give_back(image)


def assemble(directory: Path, metadata: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Make a checkpoint of the files in its work directory, of which `write_shard` has told `parts`.

    Raises:
        OSError, CheckpointError: the manifest could not be written, or not as it was meant; nothing has changed.
    """
    work = work_directory(directory)
    files, tensors = _merge(parts)
    remove_strangers(work, set(files))
    write_synced(work / MANIFEST, manifest_text(metadata, files, tensors))
    read_manifest(work)
    publish(directory)


def _assembled(directory: Path, metadata: Mapping[str, Any], parts: Sequence[tuple[Part, str | None]]) -> str | None:
    """Assemble the checkpoint when all ranks have written; returns what went wrong, of which nothing is left."""
    error = next((error for _, error in parts if error is not None), None)
    if error is None:
        try:
            assemble(directory, metadata, [part for part, _ in parts])
        except (OSError, CheckpointError) as caught:
            error = _words(caught)
    if error is not None:
        shutil.rmtree(work_directory(directory), ignore_errors=True)
    return error


def _image(shard: Shard[Piece], memory: memoryview) -> memoryview:
    """Copy the shard into memory of its size, as its file will have it."""
    memory[: len(shard.header)] = shard.header
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    for piece, begin in zip(shard.pieces, shard.bounds[:-1], strict=True):
        part = everything[begin : begin + piece.bytes]
        part.view(piece.dtype).view(piece.box.shape).copy_(piece.view)
    return memory


def _merge(parts: Iterable[Part]) -> tuple[dict[str, Any], dict[str, Any]]:
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for name, description in part["tensors"].items():
            tensors.setdefault(name, description | {"pieces": []})["pieces"].extend(description["pieces"])
    return files, tensors


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
