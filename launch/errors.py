"""The two kinds of failure a person sees, and how they are shown: one plain sentence on stderr."""

import signal
import sys


class WeftError(Exception):
    """A failure that its message explains in full; nobody needs its traceback."""

    exit_status: int = 1


class UserError(WeftError):
    """What the user asked for cannot be done as asked: names the key or file, the value and the remedy."""

    exit_status = 2


class RunError(WeftError):
    """What was asked for rightly failed on the way."""

    exit_status = 1


class FinalError(RunError):
    """What would fail in the same way if it were started again."""


class StoppedError(WeftError):
    """A signal ended it.

    Attributes:
        clean: what was running finished its step and left by itself.
    """

    def __init__(self, number: signal.Signals, *, clean: bool) -> None:
        super().__init__(f"Stopped by {number.name}")
        self.exit_status = 128 + number
        self.clean = clean


def show(error: BaseException) -> None:
    """Print the error's sentence to stderr, without its traceback."""
    sentence = str(error) or type(error).__name__
    print(sentence if sentence.endswith((".", "?", "!")) else f"{sentence}.", file=sys.stderr, flush=True)
