"""One rank of any world, without the others and without numbers: what it would hold, and what it would send.

The engine itself runs a step, on the meta device and torch's fake process group, so nothing here is a formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.divided import divided, gathered_bytes, undivided
from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.measured import measured_step
from weft.launch.plan.breakdown import Memory
from weft.launch.settings import Settings, check_layout, resolved
from weft.launch.units import bytes_text, count_text
from weft.launch.world import device_type
from weft.model.config import model_config
from weft.model.decoder import Block
from weft.parallel import build_mesh, count_traffic, without_numbers
from weft.parallel.traffic import Call


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a rank sends or receives over one axis in a step: calls of one operation.

    `bytes` are those of the whole tensors, `sent_bytes` those that leave this rank, as a ring sends them.
    """

    axis: str
    operation: str
    calls: int
    bytes: int
    sent_bytes: float


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a step of one rank would take.

    Attributes:
        rank: of `world_size`.
        coordinates: on each mesh axis, outermost first.
        stages: the layers of each of its stages, in words.
        parameters: that the rank holds.
        memory: bytes by kind; activations are the most of the step.
        exchanges: in the order of the axes; under ZeRO without those over the data axis, which are its engine's.
    """

    rank: int
    world_size: int
    coordinates: Mapping[str, int]
    stages: tuple[str, ...]
    parameters: int
    memory: Memory
    exchanges: tuple[Exchange, ...]


def dry_run(settings: Settings, world_size: int, rank: int = 0) -> DryRun:
    """Run a step of `rank` of a world that does not exist.

    Raises:
        UserError: the layout does not fit the world, or the world has no such rank.
    """
    check_layout(settings, world_size)
    if rank >= world_size:
        raise UserError(f"--rank is {rank}, but the world has the ranks 0 to {world_size - 1}; choose one of them.")
    settings = resolved(settings, world_size)
    mesh = _fake_mesh(settings, world_size, rank)
    try:
        return _run_step(settings, mesh)
    finally:
        dist.destroy_process_group()


def _fake_mesh(settings: Settings, world_size: int, rank: int) -> DeviceMesh:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = settings.parallel
    assert parallel.data != "auto"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return build_mesh(
        pipeline=parallel.pipeline,
        data=parallel.data,
        context=parallel.context,
        tensor=parallel.tensor,
        device_type=device_type(settings),
    )


def _run_step(settings: Settings, mesh: DeviceMesh) -> DryRun:
    device = torch.device("meta")
    shape = (settings.batch.global_size // mesh["data"].size(), settings.corpus.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    zero = settings.parallel.zero
    with without_numbers():
        engine = Engine(model_config(settings.model), undivided(settings), mesh, device=device)
        with count_traffic() as traffic:
            _, memory = measured_step(engine, 0, tokens, tokens)
    axes = mesh.mesh_dim_names or ()
    return DryRun(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        coordinates={axis: mesh[axis].get_local_rank() for axis in axes},
        stages=tuple(engine.describe_stages()),
        parameters=sum(parameter.numel() for parameter in engine.parameters),
        memory=divided(memory, settings, gathered_bytes(engine.modules, Block)),
        exchanges=tuple(e for e in exchanges_of(traffic.calls, mesh) if not zero or e.axis != "data"),
    )


def exchanges_of(calls: Sequence[Call], mesh: DeviceMesh) -> tuple[Exchange, ...]:
    """Calls over the axes of `mesh`, summed by axis and operation."""
    axes = {str(mesh[axis].get_group().group_name): axis for axis in mesh.mesh_dim_names or ()}
    kinds = sorted({(call.group, call.operation) for call in calls}, key=lambda kind: (list(axes).index(kind[0]), kind))
    return tuple(
        Exchange(
            axis=axes[group],
            operation=operation,
            calls=len(own),
            bytes=sum(call.bytes for call in own),
            sent_bytes=sum(call.sent_bytes for call in own),
        )
        for group, operation in kinds
        if (own := [call for call in calls if (call.group, call.operation) == (group, operation)])
    )


def dry_run_text(run: DryRun) -> str:
    """The run as a few tables."""
    place = ", ".join(f"{axis} {coordinate}" for axis, coordinate in run.coordinates.items())
    lines = [
        f"rank {run.rank} of {run.world_size:,}: {place}",
        f"{'; '.join(run.stages)}; {run.parameters:,} parameters ({count_text(run.parameters)})",
        "",
        "memory",
        *(f"  {kind:<12}{bytes_text(size):>10}" for kind, size in run.memory.parts.items() if size),
        f"  {'total':<12}{bytes_text(run.memory.total):>10}",
        "",
        f"communication of one step\n  {'axis':<10}{'operation':<16}{'calls':>8}{'tensors':>10}{'sent':>10}",
        *(
            f"  {e.axis:<10}{e.operation:<16}{e.calls:>8,}{bytes_text(e.bytes):>10}{bytes_text(e.sent_bytes):>10}"
            for e in run.exchanges
        ),
    ]
    return "\n".join(lines if run.exchanges else [*lines[:-1], "no communication"])
