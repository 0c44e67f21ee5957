"""Another layout of a checkpoint: what each rank of that layout would have written, made by one process.

No layout needs it to load a checkpoint; but files that match the ranks are read in one go each. At most one piece is in
memory at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.launch.errors import RunError, UserError
from weft.launch.overrides import apply_overrides
from weft.launch.problems import known_keys
from weft.launch.saved_run import read_run
from weft.launch.settings import Settings, build_settings, check_layout
from weft.model.config import model_config
from weft.parallel import build_mesh, without_numbers
from weft.parallel.checkpoint import CheckpointError, Entry, Manifest, read_manifest
from weft.parallel.checkpoint.boxes import Box, Shape
from weft.parallel.checkpoint.entry import Piece, own_pieces
from weft.parallel.checkpoint.files import remove, work_directory
from weft.parallel.checkpoint.keys import listed
from weft.parallel.checkpoint.load import read_block
from weft.parallel.checkpoint.save import Part, assemble
from weft.parallel.checkpoint.shard_file import PieceReader, lay_out, write_shard
from weft.parallel.sharding import sharded_parameters


def reshard(source: Path, destination: Path, overrides: Sequence[str]) -> int:
    """Write the checkpoint `source` as `destination` in the layout of its settings with `overrides`.

    Returns the bytes that were read.

    Raises:
        UserError: a setting is wrong, the layout cannot be, the destination exists, or the source is damaged.
        RunError: the destination cannot be written.
    """
    if destination.exists():
        raise UserError(f"{destination} exists; choose another destination.")
    try:
        manifest, run = read_manifest(source), read_run(source)
        settings = _settings(source, run.settings, overrides)
        with PieceReader(source, manifest) as reader:
            _write(reader, manifest, settings, destination)
        return reader.bytes_read
    except CheckpointError as error:
        raise UserError(f"{error}.") from None
    except OSError as error:
        raise RunError(f"{destination} cannot be written ({error.strerror}); choose another destination.") from None


def _settings(source: Path, saved: dict[str, object], overrides: Sequence[str]) -> Settings:
    if not saved:
        raise UserError(f"{source} does not say of its settings; only checkpoints of weft train can be resharded.")
    settings = build_settings(apply_overrides(saved, overrides, list(known_keys(Settings))))
    data = 1 if settings.parallel.data == "auto" else settings.parallel.data
    whole_states = settings.parallel.model_copy(update={"data": data, "zero": 0})  # any stage of ZeRO loads them
    settings = settings.model_copy(update={"parallel": whole_states})
    check_layout(settings, _ranks(settings))
    return settings


def _ranks(settings: Settings) -> int:
    parallel = settings.parallel
    assert parallel.data != "auto"
    return prod((parallel.pipeline, parallel.data, parallel.context, parallel.tensor))


def _write(reader: PieceReader, manifest: Manifest, settings: Settings, destination: Path) -> None:
    work = work_directory(destination)
    remove(work)
    work.mkdir(parents=True)
    try:
        parts = [_write_rank(reader, manifest, settings, work, rank) for rank in range(_ranks(settings))]
        lost = manifest.tensors.keys() - set().union(*(part["tensors"] for part in parts))
        if lost:
            raise CheckpointError(
                f"{listed(lost)} in the checkpoint are not of the model of its settings; choose another"
            )
        metadata = manifest.metadata | {"settings": settings.model_dump(mode="json")}
        assemble(destination, metadata, parts)
    finally:
        remove(work)


def _write_rank(reader: PieceReader, manifest: Manifest, settings: Settings, work: Path, rank: int) -> Part:
    with _fake_mesh(settings, rank) as mesh:
        pieces = own_pieces(list(_entries(manifest, settings, mesh)), mesh)
    if not pieces:
        return {"files": {}, "tensors": {}}
    stored = [_StoredPiece(piece, reader, manifest) for piece in pieces]
    return write_shard(work / f"rank-{rank:05d}.safetensors", lay_out(stored))


def _entries(manifest: Manifest, settings: Settings, mesh: DeviceMesh) -> Iterator[Entry]:
    """Every kind of tensor that is stored of the weights that this rank holds, split as the weight where it can be."""
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in manifest.tensors))
    with without_numbers():
        engine = Engine(model_config(settings.model), settings, mesh, device=torch.device("meta"))
    for weight in _weights(engine):
        for kind in kinds:
            name = f"{kind}/{weight.name}"
            record = manifest.tensors.get(name)
            if record is None:
                continue
            dtype = getattr(torch, record.dtype)
            if record.shape == weight.full_shape:
                yield replace(weight, name=name, tensor=weight.tensor.to(dtype))
            else:
                yield Entry(name, torch.empty(record.shape, dtype=dtype, device="meta"), shared=weight.shared)


def _weights(engine: Engine) -> Iterator[Entry]:
    """The parameters of an engine's stages; one that stages share is the first one's."""
    for stage in engine.stages:
        common = {id(parameter): key for key, parameter in stage.shared.items()}
        for name, parameter, sharding in sharded_parameters(stage.module):
            known = common.get(id(parameter), name)
            copied = id(parameter) in common and known in stage.module.copies  # type: ignore[operator]
            yield Entry(known, parameter, sharding, copied)


@contextmanager
def _fake_mesh(settings: Settings, rank: int) -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = settings.parallel
    assert parallel.data != "auto"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=_ranks(settings))
    try:
        yield build_mesh(
            pipeline=parallel.pipeline, data=parallel.data, context=parallel.context, tensor=parallel.tensor
        )
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class _StoredPiece:
    """A piece whose values stand in another checkpoint."""

    piece: Piece
    reader: PieceReader
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.piece.name

    @property
    def full_shape(self) -> Shape:
        return self.piece.full_shape

    @property
    def box(self) -> Box:
        return self.piece.box

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    def read(self) -> Tensor:
        return read_block(self.reader, self.manifest, self.name, self.box)
