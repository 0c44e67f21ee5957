"""The progress line: plain where it is read later, a bar on a terminal, short where there is little room."""

import io
import os
import pty
import re
from contextlib import suppress

import pytest

from weft.launch.metrics import StepMetrics
from weft.launch.progress import Progress
from weft.launch.units import bytes_text, count_text, milliseconds_text, seconds_text


def measured(step: int, **others: float) -> StepMetrics:
    return StepMetrics(
        step=step, loss=4.31234, tokens_per_second=21_345.0, step_seconds=0.385, memory_bytes=412_000_000, bubble=0.121,
        **others,
    )  # fmt: skip


def test_plain_lines_come_every_few_steps_and_with_each_evaluation() -> None:
    stream = io.StringIO()
    with Progress(total_steps=25, stream=stream) as progress:
        for step in range(1, 26):
            progress.step(measured(step, held_out_loss=4.5) if step == 13 else measured(step))
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step +(\d+)/25", line)[1]) for line in lines] == [1, 10, 13, 20, 25]
    assert "held-out" not in lines[1]
    assert all("held-out 4.500" in line for line in lines[2:]), "the last one measured stays in sight"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue()), "no control characters in a log"


def test_slow_steps_are_shown_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = iter(range(0, 10_000, 15))
    monkeypatch.setattr("weft.launch.progress.time.monotonic", lambda: float(next(clock)))
    progress = Progress(total_steps=100, stream=stream, every_steps=1000, every_seconds=40.0)
    for step in range(1, 10):
        progress.step(measured(step))
    assert 3 <= len(stream.getvalue().splitlines()) <= 5


def test_line_says_every_number_with_its_unit() -> None:
    progress = Progress(total_steps=200, stream=io.StringIO())
    progress.step(measured(120, held_out_loss=4.5012))
    expected = "step 120/200  loss 4.312  held-out 4.501  21.3k tokens/s  385 ms  bubble 12%  memory 412 MB"
    assert progress.line() == expected


def test_devices_have_units_of_their_own() -> None:
    progress = Progress(total_steps=200, stream=io.StringIO(), device="cuda:3")
    progress.step(measured(1, mfu=0.4123))
    assert "MFU 41%" in progress.line()
    assert "GPU memory 412 MB" in progress.line()


def test_time_left_is_of_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("weft.launch.progress.time.monotonic", lambda: now)
    progress = Progress(total_steps=50, stream=io.StringIO())
    progress.step(measured(10))
    assert "left" not in progress.line(), "one step tells nothing yet"
    now = 110.0
    progress.step(measured(15))
    assert "1:10 left" in progress.line()


@pytest.mark.parametrize("width", range(10, 130, 6))
def test_line_fits_its_width(width: int) -> None:
    progress = Progress(total_steps=200, stream=io.StringIO())
    progress.step(measured(120, held_out_loss=4.5))
    line = progress.line(width)
    assert len(line) <= max(width, len("step 120/200"))
    assert line.startswith("step 120/200")
    assert line in progress.line() or len(line.split("  ")) < len(progress.line().split("  "))


def test_terminal_shows_a_bar_and_keeps_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    shown = on_a_terminal()
    assert "━" in shown
    assert "step 20/20" in shown
    assert "saved [a] checkpoint" in shown


def test_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = on_a_terminal()
    assert "\x1b" not in shown
    assert "step 20/20" in shown


def on_a_terminal() -> str:
    """What a run of 20 steps writes to a terminal of its own."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream, Progress(total_steps=20, stream=stream) as progress:
        for step in range(1, 21):
            progress.step(measured(step))
        progress.say("saved [a] checkpoint")
    shown = b""
    with suppress(OSError):  # how a terminal without a writer ends
        while part := os.read(reader, 100_000):
            shown += part
    os.close(reader)
    return shown.decode()


def test_units_keep_three_digits() -> None:
    assert [bytes_text(size) for size in (0, 999, 1000, 412e6, 9.996e9, 999.6e9)] == [
        "0 B", "999 B", "1.00 kB", "412 MB", "10.0 GB", "1.00 TB",
    ]  # fmt: skip
    assert [count_text(number) for number in (0, 12.34, 999.7, 21_345, 4.72e6)] == [
        "0",
        "12.3",
        "1.00k",
        "21.3k",
        "4.72M",
    ]
    assert [seconds_text(time) for time in (0, 59.6, 3840, 200_000)] == ["0:00", "1:00", "1:04:00", "2 d 7 h"]
    assert [milliseconds_text(time) for time in (0.0123, 0.385, 0.9999, 12.34)] == [
        "12.3 ms",
        "385 ms",
        "1 s",
        "12.3 s",
    ]


def test_progress_is_for_people_on_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(total_steps=1).step(measured(1))
    captured = capsys.readouterr()
    assert (captured.out, "step 1/1" in captured.err) == ("", True)
