"""Ranks for which the layout has no work: they stand by until the others have ended, ready for the next start."""

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from weft.launch.signals import StopRequest

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_ENDED = "weft/ended"
_HEARD = "weft/heard"
_LOOK_SECONDS = 0.2
_LAST_SECONDS = 5.0


def stand_by(stop: StopRequest, *, timeout: float) -> None:
    """Wait until the ranks that work say that they have ended, or this one is asked to stop.

    Raises:
        RuntimeError: they are gone without a word.
    """
    store = _store(timeout)
    while stop.requested is None:
        if store.check([_ENDED]):
            store.add(_HEARD, 1)
            return
        time.sleep(_LOOK_SECONDS)


def release(idle: int, *, timeout: float) -> None:
    """Let the idle ranks end; called by rank 0, in whose process their store may live, when the run is over."""
    if not idle:
        return
    store = _store(timeout)
    store.set(_ENDED, "1")
    deadline = time.monotonic() + _LAST_SECONDS
    while store.add(_HEARD, 0) < idle and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _store(timeout: float) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )
