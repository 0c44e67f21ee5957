"""The rank grid: four named axes over the ranks of a job, on torch's own DeviceMesh.

The grid is written once, as `arange(world).view(pipeline, data, context, tensor)`: ranks that differ only in their
tensor coordinate are neighbours (tensor parallelism talks most, so it stays inside a node), pipeline stages lie
farthest apart. Every group is a slice of the grid: `mesh["tensor"]`, `mesh["pipeline"]`, …
"""

import atexit
import gc
import os
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from weft.parallel.background import with_background_threads
from weft.parallel.meeting import links_of

AXES = ("pipeline", "data", "context", "tensor")
DEFAULT_TIMEOUT = timedelta(minutes=10)


def build_mesh(
    *,
    pipeline: int = 1,
    data: int = 1,
    context: int = 1,
    tensor: int = 1,
    device_type: str = "cpu",
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> DeviceMesh:
    """Build the mesh of a job, with the axis names of `AXES`, outermost first.

    Starts the default process group from torchrun's environment when there is none yet. A mesh of one rank needs no
    launcher: without torchrun's environment it starts a process group of one. A communication that waits for a peer
    for longer than `timeout` raises.

    Raises:
        ValueError: the product of the sizes is not the world size, or a size is not a positive whole number.
    """
    sizes = {"pipeline": pipeline, "data": data, "context": context, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis} is {size}; choose a whole number of at least 1")
    if device_type != "cpu":  # a GPU is chosen per thread
        return _make_mesh(sizes, device_type, timeout)
    return with_background_threads(partial(_make_mesh, sizes, device_type, timeout))


def _make_mesh(sizes: dict[str, int], device_type: str, timeout: timedelta) -> DeviceMesh:
    ranks = prod(sizes.values())
    if not dist.is_initialized():
        _start_process_group(ranks, device_type, timeout)
    world_size = dist.get_world_size()
    if ranks != world_size:
        grid = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(f"{grid} is {ranks} ranks, but the world has {world_size}; choose sizes whose product is that")
    options: Any = None
    if dist.get_backend() != "fake":
        options = {axis: _group_options(device_type, timeout) for axis in AXES}
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXES, backend_override=options)
    if device_type == "cpu":
        for axis in AXES:
            links_of(mesh[axis].get_group())  # now, while all ranks are here, and in one order on all of them
    return mesh


def _group_options(device_type: str, timeout: timedelta) -> tuple[str, Any]:
    # gloo's sends and receives know no other time limit than the one that their group was made with
    backend = "nccl" if device_type == "cuda" else "gloo"
    options = dist.ProcessGroupNCCL.Options() if backend == "nccl" else dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    return backend, options


def _start_process_group(ranks: int, device_type: str, timeout: timedelta) -> None:
    options: dict[str, Any] = {"backend": "nccl" if device_type == "cuda" else "gloo", "timeout": timeout}
    if ranks == 1 and "WORLD_SIZE" not in os.environ:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    if options["backend"] == "gloo":
        atexit.register(_end_process_group)


def _end_process_group() -> None:
    """End what was started here, for scripts that forget to, and let go of groups that only cycles of objects hold.

    A thread of gloo that still drops the tensors of its last message while the interpreter ends aborts the process. It
    is joined when the last reference to its group goes.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
