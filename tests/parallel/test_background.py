"""Threads of low priority: those that a call starts, and no others."""

import os
import sys
import threading

import pytest

from weft.parallel.background import LOWEST_PRIORITY, with_background_threads


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_threads_started_by_the_call_have_low_priority_and_the_caller_keeps_its_own() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    ready, end = threading.Event(), threading.Event()
    priorities = []

    def work() -> None:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        ready.set()
        end.wait(10)

    def start() -> threading.Thread:
        thread = threading.Thread(target=work)
        thread.start()
        return thread

    thread = with_background_threads(start)
    assert ready.wait(10)
    end.set()
    thread.join()
    assert priorities == [LOWEST_PRIORITY]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_what_the_call_returns_and_raises_comes_through() -> None:
    def fail() -> None:
        raise ValueError("no such size")

    assert with_background_threads(lambda: 3) == 3
    with pytest.raises(ValueError, match="no such size"):
        with_background_threads(fail)
