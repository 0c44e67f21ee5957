"""The pool: fresh groups, results and failures per rank, recovery from hangs and deaths, no orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.pool import Pool, RankError


def describe() -> dict[str, object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    group = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "backend": dist.get_backend()}
    return {**group, "threads": torch.get_num_threads(), "environment": [os.environ[name] for name in names]}


def total_over_ranks(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    total = (x + dist.get_rank()) * scale
    dist.all_reduce(total)
    return total


def total_over_mesh() -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    totals = []
    for axis in ("rows", "columns"):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=mesh[axis].get_group())
        totals.append(total.item())
    return totals


def leave_mess() -> None:
    os.environ["MESS"] = "left"
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    dist.new_group([0])
    dist.all_reduce(torch.ones(2), async_op=True)
    dist.barrier()


def find_mess() -> tuple[bool, torch.dtype, torch.Tensor, int]:
    return "MESS" in os.environ, torch.get_default_dtype(), torch.rand(3), dist.get_world_size()


def fail_on(rank: int, *, with_mesh: bool = False) -> None:
    axis = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",)) if with_mesh else None
    if dist.get_rank() == rank:
        raise KeyError("the real reason")
    dist.all_reduce(torch.ones(1), group=axis.get_group() if axis else None)


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklably() -> None:
    raise UnpicklableError(1, 2)


def hang_on(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        time.sleep(3600)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def process_id() -> int:
    return os.getpid()


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """A pool that may be broken without slowing the session's."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_its_group_and_environment(pool: Pool, world_size: int) -> None:
    for rank, seen in enumerate(pool.run(world_size, describe)):
        assert seen == {
            "rank": rank,
            "world_size": world_size,
            "backend": "gloo",
            "threads": 1,
            "environment": [str(rank), str(rank), str(world_size)],
        }


def test_arguments_and_results_are_tensors(pool: Pool) -> None:
    for total in pool.run(3, total_over_ranks, torch.tensor([1.0, 2.0]), scale=2.0):
        assert total.tolist() == [12.0, 18.0]


def test_meshes_of_consecutive_runs_do_not_meet(pool: Pool) -> None:
    for _ in range(3):
        assert pool.run(4, total_over_mesh) == [[2.0, 1.0], [4.0, 1.0], [2.0, 5.0], [4.0, 5.0]]


def test_a_run_leaves_nothing_to_the_next(pool: Pool) -> None:
    clean = pool.run(2, find_mess)
    pool.run(2, leave_mess)
    for mess, dtype, drawn, world_size in pool.run(2, find_mess):
        assert not mess
        assert dtype == torch.float32
        assert torch.equal(drawn, clean[0][2])
        assert world_size == 2


def test_workers_are_reused(pool: Pool) -> None:
    first = pool.run(2, process_id)
    assert pool.run(2, process_id) == first
    assert pool.run(1, process_id) == first[:1]


def test_a_run_takes_tens_of_milliseconds(pool: Pool) -> None:
    pool.run(4, process_id)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        pool.run(4, process_id)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


@pytest.mark.parametrize("with_mesh", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_real_failure_is_raised(pool: Pool, rank: int, with_mesh: bool) -> None:
    before = pool.run(3, process_id)
    with pytest.raises(KeyError, match="the real reason") as caught:
        pool.run(3, fail_on, rank, with_mesh=with_mesh)
    assert isinstance(caught.value.__cause__, RankError)
    assert f"rank {rank} of 3" in str(caught.value.__cause__)
    assert "in fail_on" in str(caught.value.__cause__)
    assert pool.run(3, process_id) == before, "a failure must not cost the workers"


def test_a_failure_that_cannot_be_pickled_keeps_its_words(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: 1 and 2"):
        pool.run(1, fail_unpicklably)


def test_a_hang_names_the_busy_ranks_and_the_pool_recovers(own_pool: Pool) -> None:
    with pytest.raises(TimeoutError, match=r"^rank 1 of 2 still ran after 3 s") as caught:
        own_pool.run(2, hang_on, [1], timeout=3)
    assert "in hang_on" in str(caught.value.__cause__)
    with pytest.raises(TimeoutError, match=r"^ranks 0, 1 of 2"):
        own_pool.run(2, hang_on, [0, 1], timeout=3)
    assert [seen["rank"] for seen in own_pool.run(2, describe)] == [0, 1]


def test_a_dead_rank_is_named_and_the_pool_recovers(own_pool: Pool) -> None:
    with pytest.raises(ChildProcessError, match="exit code -9") as caught:
        own_pool.run(2, die_on, 1)
    assert "rank 1 of 2" in str(caught.value.__cause__)
    assert len(own_pool.run(2, process_id)) == 2


def test_a_world_beyond_the_pool_is_refused(own_pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"world size 3 is not within 1 … 2"):
        own_pool.run(3, process_id)


PARENT = """
from tests.pool import Pool
from tests.test_pool import hang_on, process_id
if __name__ == "__main__":
    pool = Pool(2)
    print(*pool.run(2, process_id), flush=True)
    pool.run(2, hang_on, [0, 1])
"""


def test_busy_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    workers = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
