"""A polite stop: SIGINT and SIGTERM ask a rank to finish its step, save and leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        requested: the name of the first signal that asked, such as SIGTERM; None while nobody has.
    """

    requested: str | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM in a `StopRequest` instead of dying of them; handlers are put back at the end.

    A signal reaches the ranks of a job at different moments, so the ranks must agree on the step to stop at, and
    a repeated signal changes nothing: the launcher, a scheduler and the terminal may each send their own.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.requested = request.requested or signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
