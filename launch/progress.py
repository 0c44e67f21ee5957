"""How training goes, in one line: a bar that renews itself on a terminal, plain lines anywhere else."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TextIO

from weft.launch.metrics import StepMetrics
from weft.launch.units import bytes_text, count_text, milliseconds_text, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR = range(8, 41)  # columns that the bar may take
_GAP = "  "


class Field(NamedTuple):
    """One entry of the line; on a narrow terminal, those of the highest `rank` go first."""

    rank: int
    text: str


class Progress:
    """Shows the steps of a run as they end; on rank 0 alone.

        with Progress(total_steps=200, device="cpu") as progress:
            progress.step(metrics)
            progress.say("saved a checkpoint")

    Args:
        total_steps: of the whole run.
        device: `cpu` or `cuda`, which says what kind of memory is counted.
        stream: where to; standard error by default.
        every_steps, every_seconds: without a terminal, a line is printed after so many steps or, when these take
            longer, seconds; and for the first step, the last, and each one with a held-out loss.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        device: str = "cpu",
        stream: TextIO | None = None,
        every_steps: int = 10,
        every_seconds: float = 30.0,
    ) -> None:
        self._total = total_steps
        self._memory = "GPU memory" if device.startswith("cuda") else "memory"
        self._stream = stream or sys.stderr
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._latest = StepMetrics(step=0)
        self._held_out: float | None = None
        self._first: tuple[int, float] | None = None
        self._printed_at = -float("inf")
        self._live = _Live(self) if _is_terminal(self._stream) else None

    def step(self, metrics: StepMetrics) -> None:
        """Take in what a step measured."""
        now = time.monotonic()
        starts = self._first is None
        self._first = self._first or (metrics.step, now)
        self._latest = metrics
        if metrics.held_out_loss is not None:
            self._held_out = metrics.held_out_loss
        if self._live is not None:
            return
        due = metrics.step % self._every_steps == 0 or now - self._printed_at >= self._every_seconds
        if due or starts or metrics.held_out_loss is not None or metrics.step == self._total:
            self._printed_at = now
            self.say(self.line())

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._live is not None:
            self._live.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def line(self, width: int | None = None) -> str:
        """The line, shortened to `width` columns by leaving out what matters least."""
        fields = self._fields()
        while width is not None and len(fields) > 1 and len(_joined(fields)) > width:
            fields.remove(max(fields))
        return _joined(fields)

    @property
    def share(self) -> float:
        """How much of the run is done, between 0 and 1."""
        return min(self._latest.step / self._total, 1.0)

    def _fields(self) -> list[Field]:
        latest = self._latest
        digits = len(str(self._total))
        fields = [Field(0, f"step {latest.step:>{digits}}/{self._total}")]
        if latest.loss is not None:
            fields.append(Field(1, f"loss {latest.loss:.3f}"))
        if self._held_out is not None:
            fields.append(Field(3, f"held-out {self._held_out:.3f}"))
        if latest.tokens_per_second is not None:
            fields.append(Field(4, f"{count_text(latest.tokens_per_second)} tokens/s"))
        if latest.step_seconds is not None:
            fields.append(Field(6, milliseconds_text(latest.step_seconds)))
        if latest.mfu is not None:
            fields.append(Field(5, f"MFU {latest.mfu:.0%}"))
        if latest.bubble is not None:
            fields.append(Field(7, f"bubble {latest.bubble:.0%}"))
        if latest.memory_bytes is not None:
            fields.append(Field(8, f"{self._memory} {bytes_text(latest.memory_bytes)}"))
        left = self._seconds_left()
        if left is not None:
            fields.append(Field(2, f"{seconds_text(left)} left"))
        return fields

    def _seconds_left(self) -> float | None:
        """From the mean of all steps but the first, which is slower than the rest."""
        if self._first is None:
            return None
        first_step, first_time = self._first
        done = self._latest.step - first_step
        if done <= 0:
            return None
        return (time.monotonic() - first_time) / done * max(self._total - self._latest.step, 0)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _joined(fields: list[Field]) -> str:
    return _GAP.join(field.text for field in fields)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class _Live:
    """The renewing line of a `Progress`, drawn by rich."""

    def __init__(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress = progress
        self._console = Console(file=progress._stream, highlight=False)
        self._live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _draw(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = self._progress.line(self._console.width - _BAR.start - len(_GAP))
        room = self._console.width - len(text) - len(_GAP)
        row = Table.grid(padding=(0, len(_GAP), 0, 0))
        row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=1.0, completed=self._progress.share, width=min(room, _BAR.stop - 1)), Text(text))
        return row
