"""Which of several failed ranks failed first, and one sentence about it."""

import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.launch.errors import FinalError, RunError, UserError, WeftError
from weft.parallel.records import read_record

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What gloo, NCCL, the store and sockets say when the other side is gone.
_PEER_LOST = re.compile(r"by peer|broken pipe|connection|socket|timed out|timeout|remote process|NCCL", re.IGNORECASE)

_FLIGHT = "flight-recorder-rank-"


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended.

    Attributes:
        exit_status: of the process; negative for the signal that killed it.
        kind: class name of the exception, empty when there was none.
        message: its message.
        traceback: its traceback.
        time: when it was raised, in seconds since the epoch; infinite when unknown.
        doing: what it was doing, as its record tells it; only of a rank that ended without an exception.
    """

    rank: int
    exit_status: int
    kind: str = ""
    message: str = ""
    traceback: str = ""
    time: float = float("inf")
    doing: str = ""

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        """Sorts causes before their effects: errors, then deaths, then what follows from another's end; by time.

        SIGTERM is how the agent ends the ranks that are left.
        """
        follows = self.exit_status == -signal.SIGTERM or bool(self.kind and _PEER_LOST.search(self.message))
        return (follows, not self.kind, self.time, self.rank)


def read_failures(failures: Mapping[int, "ProcessFailure"], logs: Path) -> list[RankFailure]:
    """The failures, by rank, as the agent and what the ranks have left in the folder of their logs tell them."""
    return [_read_failure(rank, failure, logs) for rank, failure in failures.items()]


def _read_failure(rank: int, failure: "ProcessFailure", logs: Path) -> RankFailure:
    path = Path(failure.error_file)
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError):  # none, or one that a killed rank left unfinished
        return RankFailure(rank, failure.exitcode, doing=_doing(logs, rank))
    kind, _, words = message["message"].partition(": ")
    # The file's own time, because the one written in it counts whole seconds.
    return RankFailure(
        rank, failure.exitcode, kind, words, message["extraInfo"]["py_callstack"], path.stat().st_mtime_ns / 1e9
    )


def _doing(folder: Path, rank: int) -> str:
    record = read_record(folder, rank)
    return str(record) if record else ""


def explain(failures: Sequence[RankFailure], *, logs: Path) -> WeftError:
    """The error to show for a job whose ranks failed; those that the launcher itself has ended are not among them.

    Args:
        logs: folder of the ranks' logs.
    """
    first = min(failures, key=lambda failure: failure.order, default=None)
    if first is None:
        return RunError(f"The ranks were ended, and none of them said why; the logs are in {logs}.")
    if first.kind == UserError.__name__:
        return UserError(first.message)
    if first.kind == FinalError.__name__:
        return FinalError(first.message)
    error = RunError(_with_flight(first.message if first.kind == RunError.__name__ else _sentence(first, logs), logs))
    error.__cause__ = RuntimeError(f"on rank {first.rank}:\n{first.traceback}") if first.traceback else None
    return error


def flight_recorder(logs: Path) -> dict[str, str]:
    """The variables by which torch on NCCL writes what each rank has sent into `logs`, when a wait is too long."""
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs / _FLIGHT),
    }


def _with_flight(words: str, logs: Path) -> str:
    if not any(logs.glob(f"{_FLIGHT}*")):
        return words
    return f"{words.rstrip('.')}; torch's flight recorder has written {logs / _FLIGHT}*, which torchfrtrace compares."


def _sentence(failure: RankFailure, logs: Path) -> str:
    log = logs / f"rank-{failure.rank}-stderr.log"
    if failure.kind:
        line = next(iter(failure.message.splitlines()), "")
        return f"Rank {failure.rank} failed: {failure.kind}: {line} (traceback in {log})"
    if failure.exit_status < 0:
        name = signal.Signals(-failure.exit_status).name
        hint = ", as a machine out of memory does" if name == "SIGKILL" else ""
        doing = f"{',' if hint else ''} {failure.doing}" if failure.doing else ""
        return f"Rank {failure.rank} was killed by {name}{hint}{doing}; the logs are in {logs}."
    doing = f" {failure.doing}" if failure.doing else ""
    return f"Rank {failure.rank} exited with status {failure.exit_status}{doing}; the logs are in {logs}."
