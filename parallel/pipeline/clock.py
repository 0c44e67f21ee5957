"""When actions start and end: marks that cost a step next to nothing, read as seconds afterwards."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments, and reads them as seconds of `time.perf_counter`."""

    def mark(self) -> Any: ...

    def read(self, marks: Sequence[Any]) -> list[float]: ...


class HostClock:
    """Marks moments of the CPU, by which the work on a CPU's tensors is done."""

    def mark(self) -> float:
        return perf_counter()

    def read(self, marks: Sequence[float]) -> list[float]:
        return list(marks)


class StreamClock:
    """Marks moments of a GPU's current stream: events between its kernels, for which nobody waits.

    Only reading waits, until the stream has come to its end; the moments are told from there backwards.
    """

    def __init__(self, make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        self._make_event = make_event

    def mark(self) -> Any:
        event = self._make_event()
        event.record()
        return event

    def read(self, marks: Sequence[Any]) -> list[float]:
        last = self.mark()
        last.synchronize()
        now = perf_counter()
        return [now - mark.elapsed_time(last) / 1e3 for mark in marks]


def clock_of(device: torch.device) -> Clock:
    """The clock by which work on `device` is timed."""
    return StreamClock() if device.type == "cuda" else HostClock()
