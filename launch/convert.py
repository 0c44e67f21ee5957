"""Hugging Face directories into checkpoints, and back, bit for bit; one tensor is in memory at a time."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.launch.errors import UserError
from weft.launch.source import Source
from weft.launch.tokenizer import end_of_text, load_tokenizer
from weft.launch.vocabulary import FILES, read_json
from weft.model.config import ModelConfig, model_config
from weft.model.hugging_face import find_stored, place_of, read_rows, stored_shape
from weft.model.hugging_face_config import hugging_face_config
from weft.model.safetensors_writer import Outgoing, write_safetensors
from weft.model.stage import build_stage
from weft.model.weight_names import Place
from weft.parallel import build_mesh
from weft.parallel.checkpoint import MANIFEST, Manifest, read_manifest
from weft.parallel.checkpoint.boxes import Box, Shape, whole
from weft.parallel.checkpoint.files import publish, remove, work_directory, write_synced
from weft.parallel.checkpoint.load import read_block
from weft.parallel.checkpoint.manifest import manifest_text
from weft.parallel.checkpoint.shard_file import PieceReader, lay_out, write_shard
from weft.parallel.sharding import sharded_parameters
from weft.parallel.tensor.load import TensorFiles

VOCABULARY_FILES = (
    "tokenizer.json",
    *FILES,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "spiece.model",
)
MODEL = "model/"
MOST_PIECES, SMALLEST_PIECE = 16, 256 * 1024


@dataclass(frozen=True)
class StoredPiece:
    """Some rows of a parameter, which stand in the files of a Hugging Face directory."""

    name: str
    full_shape: Shape
    box: Box
    dtype: torch.dtype
    stored: Any
    place: Place

    def read(self) -> Tensor:
        return read_rows(self.stored, self.place, self.box.offset[0], self.box.shape[0]).contiguous()


def to_checkpoint(directory: Path, settings: Mapping[str, Any], destination: Path) -> list[str]:
    """Write the weights of a Hugging Face directory, with its tokenizer, as a checkpoint of step 0.

    `settings`: of a run, kept in the checkpoint; their `model` is the directory's config. Returns the names of the
    stored tensors that the model has no place for.

    Raises:
        ValueError: the directory's files cannot be read, or are not those of its config.
        OSError: the checkpoint cannot be written; nothing is left of it.
    """
    config = model_config(settings["model"])
    work = work_directory(destination)
    remove(work)
    work.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = TensorFiles(directory, stack)
            pieces = list(_pieces(files, config))
            left_out = set(files.names()) - {files.full_name(piece.place.name) for piece in pieces}
            written = write_shard(work / "rank-00000.safetensors", lay_out(pieces))
        metadata = {"step": 0, "counters": {"optimizer_steps": 0}, "settings": settings}
        write_synced(work / MANIFEST, manifest_text(metadata, written["files"], written["tensors"]))
        read_manifest(work)
        _copy_files(directory, work, (*VOCABULARY_FILES, "config.json"))
        publish(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sorted(left_out)


def to_hugging_face(
    source: Source, destination: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Write the weights of a checkpoint, with config, tokenizer and generation config, as a Hugging Face directory.

    `dtype`: of the floating-point weights; None keeps theirs.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UserError: it lacks a part of the model.
        OSError: the directory cannot be written; nothing is left of it.
    """
    manifest = read_manifest(source.path)
    work = work_directory(destination)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with PieceReader(source.path, manifest) as reader:
            tensors = list(_outgoing(reader, manifest, source.config, dtype))
            write_safetensors(work, tensors, shard_bytes=shard_bytes)
        stored = str(max(tensors, key=lambda tensor: tensor.bytes).dtype).removeprefix("torch.")
        tokenizer = source.find("tokenizer.json")
        _copy_files(tokenizer.parent if tokenizer is not None else source.path, work, VOCABULARY_FILES)
        ends = _special_tokens(tokenizer)
        config = hugging_face_config(source.settings.model, dtype=stored, vocabulary=ends)
        _write_json(work / "config.json", config)
        if not (work / "generation_config.json").exists():
            kept = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
            _write_json(work / "generation_config.json", {key: kept[key] for key in kept if kept[key] is not None})
        work.rename(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pieces(files: TensorFiles, config: ModelConfig) -> Iterator[StoredPiece]:
    for name, shape in parameter_shapes(config).items():
        place = place_of(name, config, shape)
        stored = find_stored(files, place, shape)
        dtype = read_rows(stored, place, 0, 1).dtype
        parts = min(MOST_PIECES, max(1, prod(shape) * dtype.itemsize // SMALLEST_PIECE))
        for box in whole(shape).cut(0, parts):
            yield StoredPiece(f"{MODEL}{name}", shape, box, dtype, stored, place)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The full shape of every parameter of the model, by its name in a checkpoint."""
    started = dist.is_initialized()
    stage = build_stage(config, range(config.num_hidden_layers), mesh=build_mesh()["tensor"], device="meta")
    stage.tie()
    if not started:
        dist.destroy_process_group()
    return {
        name: tuple(parameter.shape) if sharding is None else sharding.full_shape
        for name, parameter, sharding in sharded_parameters(stage)
    }


def _outgoing(
    reader: PieceReader, manifest: Manifest, config: ModelConfig, dtype: torch.dtype | None
) -> Iterator[Outgoing]:
    """The tensors of a Hugging Face directory, each put together from the parameters that it fuses."""
    parts: dict[str, list[tuple[str, Place, Shape]]] = defaultdict(list)
    for name in parameter_shapes(config):
        if MODEL + name not in manifest.tensors:
            raise UserError(f"the checkpoint has no {name}; it is of another model than its settings say.")
        shape = manifest.tensors[MODEL + name].shape
        place = place_of(name, config, shape)
        parts[place.name].append((MODEL + name, place, shape))
    for stored_name, fused in parts.items():
        _, place, shape = fused[0]
        own = getattr(torch, manifest.tensors[fused[0][0]].dtype)
        wanted = dtype if dtype is not None and own.is_floating_point else own

        def read(fused: list[tuple[str, Place, Shape]] = fused) -> Tensor:
            return _fuse(fused, {name: read_block(reader, manifest, name, whole(shape)) for name, _, shape in fused})

        yield Outgoing(stored_name, wanted, tuple(stored_shape(place, shape)), read)


def _fuse(fused: list[tuple[str, Place, Shape]], blocks: Mapping[str, Tensor]) -> Tensor:
    """The stored tensor whose parts these blocks are."""
    if len(fused) == 1:
        name, place, _ = fused[0]
        return blocks[name].t() if place.transposed else blocks[name]
    grouped = [
        blocks[name].unflatten(0, (-1, place.length)) for name, place, _ in sorted(fused, key=lambda f: f[1].start)
    ]
    whole_tensor = torch.cat(grouped, 1).flatten(0, 1)
    return whole_tensor.t() if fused[0][1].transposed else whole_tensor


def _copy_files(origin: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def _special_tokens(tokenizer: Path | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    stated = read_json(tokenizer.parent / "generation_config.json")
    ends = {key: stated[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if stated.get(key) is not None}
    return {"eos_token_id": end_of_text(load_tokenizer(tokenizer), tokenizer.parent)} | ends


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
