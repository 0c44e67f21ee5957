"""Clocks: moments of a stream are told on the host's clock, and nobody waits before they are read."""

from time import perf_counter

import pytest

from weft.parallel.pipeline.clock import HostClock, StreamClock


class Stream:
    """A stream of work whose events happen when it gets there, later than they are recorded."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.waits = 0

    def work(self, milliseconds: float) -> None:
        self.milliseconds += milliseconds

    def make_event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.milliseconds

    def synchronize(self) -> None:
        self.stream.waits += 1

    def elapsed_time(self, later: "Event") -> float:
        return later.at - self.at


def test_moments_of_a_stream_are_its_own_and_end_now() -> None:
    stream = Stream()
    clock = StreamClock(stream.make_event)
    marks = [clock.mark()]
    for milliseconds in (2.0, 3.0):
        stream.work(milliseconds)
        marks.append(clock.mark())
    stream.work(1.0)
    assert stream.waits == 0
    before = perf_counter()
    first, second, third = clock.read(marks)
    assert stream.waits == 1
    assert (second - first, third - second) == pytest.approx((2e-3, 3e-3))
    assert before <= third + 1e-3 <= perf_counter()


def test_moments_of_the_host_are_those_of_its_counter() -> None:
    clock = HostClock()
    before = perf_counter()
    mark = clock.mark()
    assert before <= clock.read([mark])[0] <= perf_counter()
