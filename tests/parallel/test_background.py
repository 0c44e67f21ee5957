"""Background threads: those that a call starts, and no others."""

import os
import threading

import pytest

from weft.parallel.background import with_background_threads


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="batch scheduling is Linux's")
def test_threads_started_by_the_call_are_in_the_background_and_the_caller_is_not() -> None:
    policies = []

    def start() -> threading.Thread:
        thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        thread.start()
        return thread

    with_background_threads(start).join()
    assert policies == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_the_call_returns_and_raises_comes_through() -> None:
    def fail() -> None:
        raise ValueError("no such size")

    assert with_background_threads(lambda: 3) == 3
    with pytest.raises(ValueError, match="no such size"):
        with_background_threads(fail)
