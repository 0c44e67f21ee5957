"""The rank grid: which rank stands where, whom each axis joins, and what is refused."""

import os
import time
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from weft.parallel import AXES, build_mesh

SIZES = [
    {"pipeline": 2, "data": 2, "tensor": 2},
    {"pipeline": 2, "context": 2, "tensor": 2},
    {"pipeline": 1, "data": 4},
    {"data": 3, "tensor": 2},
    {"tensor": 3},
    {},
]


def place(sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """This rank's coordinate on each axis, and the ranks that a reduction over each axis adds up."""
    mesh = build_mesh(**sizes)
    assert mesh.mesh_dim_names == AXES
    members = {}
    for axis in AXES:
        seen = torch.zeros(dist.get_world_size())
        seen[dist.get_rank()] = 1
        dist.all_reduce(seen, group=mesh[axis].get_group())
        members[axis] = seen.nonzero().flatten().tolist()
    return {axis: mesh[axis].get_local_rank() for axis in AXES}, members


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ranks_count_tensor_first_and_pipeline_last(pool: Pool, sizes: dict[str, int]) -> None:
    full = [sizes.get(axis, 1) for axis in AXES]
    grid = list(product(*map(range, full)))  # the last axis varies fastest
    results = pool.run(len(grid), place, sizes)
    for coordinates, (seen, members) in zip(grid, results, strict=True):
        assert tuple(seen[axis] for axis in AXES) == coordinates
        for number, axis in enumerate(AXES):
            alike = [
                rank
                for rank, other in enumerate(grid)
                if all(other[k] == coordinates[k] for k in range(len(AXES)) if k != number)
            ]
            assert members[axis] == alike


def build_wrong(sizes: dict[str, int]) -> str:
    with pytest.raises(ValueError, match="choose") as caught:
        build_mesh(**sizes)
    return str(caught.value)


def test_sizes_that_do_not_make_the_world_are_named(pool: Pool) -> None:
    for message in pool.run(2, build_wrong, {"pipeline": 2, "tensor": 2}):
        assert "pipeline 2 × data 1 × context 1 × tensor 2 is 4 ranks" in message
        assert "world has 2" in message


@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_named(pool: Pool, size: int) -> None:
    (message,) = pool.run(1, build_wrong, {"data": size})
    assert f"mesh axis data is {size}" in message


def build_without_launcher() -> tuple[int, Any]:
    dist.destroy_process_group()
    del os.environ["WORLD_SIZE"]
    mesh = build_mesh()
    return mesh.size(), dist.get_world_size()


def test_one_rank_needs_no_launcher(pool: Pool) -> None:
    assert pool.run(1, build_without_launcher) == [(1, 1)]


def two_meshes_in_one_world() -> list[float]:
    """The same ranks in two layouts at once: no axis of one disturbs the other."""
    totals = []
    for mesh in [build_mesh(tensor=2, data=2), build_mesh(pipeline=2, data=2)]:
        x = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(x, group=mesh["data"].get_group())
        totals.append(x.item())
    return totals


def test_two_layouts_live_in_one_process(pool: Pool) -> None:
    assert pool.run(4, two_meshes_in_one_world) == [[2.0, 1.0], [4.0, 1.0], [2.0, 5.0], [4.0, 5.0]]


def wait_for_nobody(axis: str) -> list[float]:
    mesh = build_mesh(**{axis: 2}, timeout=timedelta(seconds=0.3))[axis]
    dist.barrier()
    waited = []
    if dist.get_rank() == 0:
        for communicate in (dist.all_reduce, lambda x, group: dist.recv(x, group=group, group_src=1)):
            start = time.monotonic()
            with pytest.raises(RuntimeError):
                communicate(torch.ones(1), group=mesh.get_group())
            waited.append(time.monotonic() - start)
    else:
        time.sleep(1.0)
    return waited


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_waits_are_bounded(pool: Pool, axis: str) -> None:
    waited, _ = pool.run(2, wait_for_nobody, axis)
    assert 0.2 < waited[0] < 0.8
    assert waited[1] < 0.8  # at once, once gloo has given the pair up
