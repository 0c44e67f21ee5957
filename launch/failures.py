"""Which of several failed ranks failed first, and one sentence about it."""

import json
import re
import signal
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.launch.errors import RunError, UserError, WeftError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What gloo, NCCL, the store and sockets say when the other side is gone.
_PEER_LOST = re.compile(r"by peer|broken pipe|connection|socket|timed out|timeout|remote process|NCCL", re.IGNORECASE)


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended.

    Attributes:
        exit_status: of the process; negative for the signal that killed it.
        kind: class name of the exception, empty when there was none.
        message: its message.
        traceback: its traceback.
        time: when it was raised, in seconds since the epoch; infinite when unknown.
    """

    rank: int
    exit_status: int
    kind: str = ""
    message: str = ""
    traceback: str = ""
    time: float = float("inf")

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        """Sorts causes before their effects: errors, then deaths, then what follows from another's end; by time.

        SIGTERM is how the agent ends the ranks that are left.
        """
        follows = self.exit_status == -signal.SIGTERM or bool(self.kind and _PEER_LOST.search(self.message))
        return (follows, not self.kind, self.time, self.rank)


def read_failure(rank: int, failure: "ProcessFailure") -> RankFailure:
    """A rank's failure as the agent and the rank's error file tell it."""
    path = Path(failure.error_file)
    if not path.is_file():
        return RankFailure(rank, failure.exitcode)
    message = json.loads(path.read_text(encoding="utf-8"))["message"]
    kind, _, words = message["message"].partition(": ")
    # The file's own time, because the one written in it counts whole seconds.
    return RankFailure(
        rank, failure.exitcode, kind, words, message["extraInfo"]["py_callstack"], path.stat().st_mtime_ns / 1e9
    )


def explain(failures: Mapping[int, "ProcessFailure"], *, stopped: Set[int], logs: Path) -> WeftError:
    """The error to show for a job whose ranks failed.

    Args:
        failures: by rank.
        stopped: ranks that the launcher itself ended, because another had failed.
        logs: folder of the ranks' logs.
    """
    known = [read_failure(rank, failure) for rank, failure in failures.items()]
    first = min((failure for failure in known if failure.kind or failure.rank not in stopped), key=lambda f: f.order)
    if first.kind == UserError.__name__:
        return UserError(first.message)
    error = RunError(first.message if first.kind == RunError.__name__ else _sentence(first, logs))
    error.__cause__ = RuntimeError(f"on rank {first.rank}:\n{first.traceback}") if first.traceback else None
    return error


def _sentence(failure: RankFailure, logs: Path) -> str:
    log = logs / f"rank-{failure.rank}-stderr.log"
    if failure.kind:
        line = next(iter(failure.message.splitlines()), "")
        return f"Rank {failure.rank} failed: {failure.kind}: {line} (traceback in {log})"
    if failure.exit_status < 0:
        name = signal.Signals(-failure.exit_status).name
        hint = ", as a machine out of memory does" if name == "SIGKILL" else ""
        return f"Rank {failure.rank} was killed by {name}{hint}; the logs are in {logs}."
    return f"Rank {failure.rank} exited with status {failure.exit_status}; the logs are in {logs}."
