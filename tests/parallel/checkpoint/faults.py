"""File operations that fail, or are the last thing that a process does."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "readv", "preadv", "scandir")


class Died(BaseException):
    """The process is no more."""


class Count:
    """The operations so far, and whether the process is alive."""

    def __init__(self) -> None:
        self.operations, self.dead = 0, False


@contextmanager
def failing(at: int, act: Callable[[Count], None]) -> Iterator[Count]:
    """Call `act` instead of the operation numbered `at`, from 1, and count them all."""
    count, real = Count(), {name: getattr(os, name) for name in OPERATIONS}

    def wrapped(name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            count.operations += 1
            if count.dead:
                raise Died
            if count.operations == at:
                act(count)
            return real[name](*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrapped(name))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def die(count: Count) -> None:
    """Nothing is done from now on."""
    count.dead = True
    raise Died


def fill_disk(count: Count) -> None:
    """The disk is full at this moment."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
