"""Threads that stay behind the computation."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def with_background_threads(function: Callable[[], Result]) -> Result:
    """Call `function` so that the threads that it starts, such as those of a gloo group, interrupt no other.

    gloo's event thread polls for as long as another thread holds the lock of the connection that it wants. When it has
    taken the core from that very thread, both lose the 3 to 4 ms until the scheduler takes turns. Batch scheduling, of
    Linux, lets it run on a free core at once, and on a busy one when the rank waits for a message or has had its turn.
    """
    if not hasattr(os, "sched_setscheduler"):
        return function()
    with ThreadPoolExecutor(1, initializer=_schedule_as_batch) as starter:
        return starter.submit(function).result()


def _schedule_as_batch() -> None:
    """For the calling thread; threads inherit it from the one that starts them."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
