"""Ranks that are processes on fewer cores: cores with work are never idle, and no rank is faster than its core."""

import pytest

from weft.launch.plan.breakdown import StepTime
from weft.launch.plan.cores import on_shared_cores


def test_ranks_that_never_wait_take_their_share() -> None:
    time = StepTime(compute=8.0, tensor=1.0, optimizer=0.5)
    assert on_shared_cores(time, average_work=9.0, cores_per_rank=0.5) == time


def test_waiting_of_one_rank_is_work_of_another() -> None:
    """Four ranks on two cores, a fifth of the time idle: as long as the cores have work, not longer."""
    time = StepTime(compute=8.0, bubble=2.0, optimizer=0.5)
    assert on_shared_cores(time, average_work=8.0, cores_per_rank=0.5).total == pytest.approx(8.5)


def test_a_chain_of_work_is_no_shorter_than_on_a_core_of_its_own() -> None:
    """Work that waits for itself most of the time: with half the ranks idle, each has a core."""
    time = StepTime(compute=2.0, bubble=8.0)
    found = on_shared_cores(time, average_work=2.0, cores_per_rank=0.5)
    assert found.total == pytest.approx(5.0)
    assert found.bubble == pytest.approx(3.0)


def test_unequal_ranks_are_averaged() -> None:
    time = StepTime(compute=10.0, bubble=0.0)
    assert on_shared_cores(time, average_work=6.0, cores_per_rank=0.5).total == pytest.approx(6.0)
