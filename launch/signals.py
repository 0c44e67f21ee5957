"""A polite stop: SIGINT, SIGTERM and SIGUSR1 ask a rank to finish its step, save and leave.

Batch systems send SIGTERM, or SIGUSR1 where one asks for it (Slurm: `--signal`), some time before they kill a job.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STARTED = "WEFT_STARTED"
"""The environment variable with the moment of the job's start, on the monotonic clock of its machine."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        requested: the name of the first signal that asked, such as SIGTERM; None while nobody has.
        deadline: when to stop unasked, by the monotonic clock, which no change of the date moves.
    """

    requested: str | None = None
    deadline: float = inf

    @property
    def due(self) -> bool:
        """Whether to stop after this step."""
        return self.requested is not None or time.monotonic() >= self.deadline

    def set_budget(self, seconds: float) -> None:
        """Stop so many seconds after the job was started; its launcher knows when that was, else it is now."""
        self.deadline = float(os.environ.get(STARTED, time.monotonic())) + seconds


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note the `STOP_SIGNALS` in a `StopRequest` instead of dying of them; handlers are put back at the end.

    A signal reaches the ranks of a job at different moments, so the ranks must agree on the step to stop at, and
    a repeated signal changes nothing: the launcher, a scheduler and the terminal may each send their own.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.requested = request.requested or signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
