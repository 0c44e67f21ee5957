"""Kills a rank, or the whole job, at a chosen file operation of a save; Python runs this where it is on the path.

The file that `WEFT_DOOM` names says which one: rank, number of the operation from 1, and whether the launcher goes too.
It is renamed before it is obeyed, so that the next start of the rank lives.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

OPERATIONS = (
    "open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "readv", "preadv", "listdir", "scandir",
)  # fmt: skip


class Doom:
    """Counts the file operations of saves since the file is there."""

    def __init__(self, file: str, rank: str) -> None:
        self.file, self.rank, self.count = file, rank, 0

    def wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if os.path.exists(self.file) and in_save():
                self.count += 1
                self.obey()
            return operation(*arguments, **keywords)

        return counted

    def obey(self) -> None:
        with open(self.file, encoding="utf-8") as file:
            rank, operation, launcher = file.read().split()
        if rank == self.rank and self.count >= int(operation):
            os.replace(self.file, f"{self.file}.done")
            if launcher == "launcher":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def in_save() -> bool:
    """Whether what calls is part of a save, in whatever thread."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("checkpoint/save.py") or code.co_name == "_drop_old":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


if "WEFT_DOOM" in os.environ and "RANK" in os.environ:
    doom = Doom(os.environ["WEFT_DOOM"], os.environ["RANK"])
    for name in OPERATIONS:
        setattr(os, name, doom.wrap(getattr(os, name)))
