"""A small checkpoint of one process, and the files of this folder's tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import build_mesh
from weft.parallel.checkpoint import Entry, load_checkpoint, save_checkpoint

SHARD = "rank-00000.safetensors"


@contextmanager
def alone() -> Iterator[DeviceMesh]:
    """The mesh of one process, without a launcher."""
    try:
        yield build_mesh()
    finally:
        dist.destroy_process_group()


def entries(seed: int) -> list[Entry]:
    """Random tensors of several dtypes and dims."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 6, generator=generator)
    return [
        Entry("model/layers.0.weight", weight),
        Entry("model/layers.1.weight", weight.t() * 2),
        Entry("exp_avg/layers.0.weight", torch.randn(40, 6, generator=generator).to(torch.bfloat16)),
        Entry("model/scale", torch.randn((), generator=generator)),
    ]


def save(directory: Path, seed: int, mesh: DeviceMesh) -> None:
    save_checkpoint(directory, entries(seed), {"step": seed, "counters": {}}, mesh)


def loaded_seed(directory: Path, seeds: range) -> int:
    """Which of the seeds gives exactly what the checkpoint holds."""
    held = [Entry(entry.name, torch.zeros_like(entry.tensor)) for entry in entries(0)]
    load_checkpoint(directory, held)
    for seed in seeds:
        if all(torch.equal(a.tensor, b.tensor) for a, b in zip(held, entries(seed), strict=True)):
            return seed
    raise AssertionError(f"{directory} holds what nobody saved")
