"""Threads that stay behind the computation."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

LOWEST_PRIORITY = 19


def with_background_threads(function: Callable[[], Result]) -> Result:
    """Call `function` so that the threads that it starts, such as those of a gloo group, have low priority.

    gloo's event thread polls for as long as another thread holds the lock of the connection that it wants. When it has
    taken the core from that very thread, both lose the 3 to 4 ms until the scheduler takes turns. Of low priority, it
    runs while the rank waits for a message, or on a core that is free.
    """
    if sys.platform != "linux":  # elsewhere priorities belong to processes
        return function()
    with ThreadPoolExecutor(1, initializer=_lower_own_priority) as starter:
        return starter.submit(function).result()


def _lower_own_priority() -> None:
    """Threads inherit the priority of the thread that starts them."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
