"""The processes of `weft verify`: groups of any size, failures told, nothing that hangs or is left behind."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
import torch.distributed as dist

from weft.launch.verify.pool import CallError, CallTimeoutError, Pool


class Counter:
    """What the processes hold in these tests."""

    def __init__(self) -> None:
        self.lessons = 0

    def learn(self, number: int) -> None:
        self.lessons += number

    def tell(self) -> tuple[int, int]:
        """What was learned, and the sum over the ranks of their number plus one."""
        total = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(total)
        return self.lessons, int(total)

    def echo(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return tensors

    def process(self) -> int:
        return os.getpid()

    def fail_on_last(self) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("a hole\nin it")
        dist.barrier()

    def die_on_last(self) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(7)
        dist.barrier()

    def sleep_on_last(self) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(600)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(3, timeout=4) as pool:
        pool.hold(Counter)
        pool.teach("learn", 5)
        pool.teach("learn", 1)
        yield pool


@pytest.mark.parametrize("ranks", [1, 3, 2])
def test_a_call_runs_in_a_group_of_its_own(pool: Pool, ranks: int) -> None:
    assert pool.call(ranks, "tell") == [(6, ranks * (ranks + 1) // 2)] * ranks


def test_tensors_are_sent_whatever_few_files_a_process_may_open(pool: Pool) -> None:
    sent = [torch.arange(number % 5, dtype=torch.float64) for number in range(1000)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        (received,) = pool.call(1, "echo", sent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(map(torch.equal, sent, received))


def test_the_rank_that_fails_first_is_told(pool: Pool) -> None:
    with pytest.raises(CallError, match="rank 2: ValueError: a hole in it") as error:
        pool.call(3, "fail_on_last")
    assert 'raise ValueError("a hole\\nin it")' in error.value.failure.traceback
    assert pool.call(3, "tell") == [(6, 6)] * 3


def test_a_rank_that_dies_is_told_and_replaced_by_one_that_knows_as_much(pool: Pool) -> None:
    before = pool.call(3, "process")
    with pytest.raises(CallError) as error:
        pool.call(3, "die_on_last")
    assert (error.value.failure.rank, error.value.failure.exit_status) == (2, 7)
    assert pool.call(3, "tell") == [(6, 6)] * 3
    assert before[2] not in pool.call(3, "process")


def test_a_rank_that_does_not_answer_is_ended(pool: Pool) -> None:
    before = pool.call(2, "process")
    with pytest.raises(CallTimeoutError, match="rank 1 gave no answer within 4 s"):
        pool.call(2, "sleep_on_last")
    assert not psutil.pid_exists(before[1])
    assert pool.call(2, "tell") == [(6, 3)] * 2


def test_no_process_outlives_the_pool() -> None:
    with Pool(2) as pool:
        pool.hold(Counter)
        processes = pool.call(2, "process")
    assert not any(psutil.pid_exists(process) for process in processes)


def test_no_process_outlives_a_parent_that_is_killed() -> None:
    program = (
        "import time\nfrom tests.launch.test_verify_pool import Counter\nfrom weft.launch.verify.pool import Pool\n"
        "pool = Pool(2)\npool.hold(Counter)\nprint(*pool.call(2, 'process'), flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    processes = list(map(int, parent.stdout.readline().split()))
    assert len(processes) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(process) for process in processes)
