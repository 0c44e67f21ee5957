"""Finds ranks whose copy of a parameter has silently become another than the other ranks' copies."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.launch.errors import RunError
from weft.parallel.sharding import sharded_parameters

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's words of bits, an int64 scalar: any single flipped bit changes it."""
    bits = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def check_replicas(engine: Engine) -> None:
    """Compare every parameter over the data axis, and those that are not split over the tensor axis. A collective call.

    Reads the parameters once and sends one number for each.

    Raises:
        RunError: copies differ; names the parameter and the ranks that hold another one than most.
    """
    engine.record.enter("comparison of the replicas")
    over_data = dict(_parameters(engine, split=True)) if engine.settings.parallel.zero < 3 else {}
    own = _different(over_data, engine.data) or _different(dict(_parameters(engine, split=False)), engine.tensor)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    problem = next((sentence for sentence in everyone if sentence), None)
    if problem:
        raise RunError(f"{problem}; the run goes on from the newest checkpoint, which was saved before.")


def _parameters(engine: Engine, *, split: bool) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters by stage and name; only those that every tensor rank holds whole, unless `split`."""
    for stage in engine.stages:
        for name, parameter, sharding in sharded_parameters(stage.module):
            if split or sharding is None or sharding.dim is None:
                yield f"{name} (stage {stage.index})", parameter


def _different(parameters: dict[str, Tensor], mesh: DeviceMesh) -> str | None:
    """A sentence about the first parameter that differs between the ranks of `mesh`."""
    if mesh.size() == 1 or not parameters:
        return None
    sums = torch.stack([checksum(parameter) for parameter in parameters.values()])
    everyone = [torch.empty_like(sums) for _ in range(mesh.size())]
    dist.all_gather(everyone, sums, group=mesh.get_group())
    table = torch.stack(everyone).cpu()
    for column, name in enumerate(parameters):
        found = table[:, column].tolist()
        if len(set(found)) > 1:
            return _sentence(name, found, dist.get_process_group_ranks(mesh.get_group()))
    return None


def _sentence(name: str, sums: Sequence[int], ranks: Sequence[int]) -> str:
    """Names the minority, or all where there is none."""
    common, times = Counter(sums).most_common(1)[0]
    others = [rank for rank, value in zip(ranks, sums, strict=True) if value != common]
    if 2 * times > len(sums):
        return f"{name} on {_listed(others)} is no longer what it is on the others: a fault of the hardware there"
    return f"{name} is no longer the same on {_listed(ranks)}: a fault of the hardware on one of them"


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
