"""What each rank is doing: a small memory-mapped record that others can read even when the rank is stopped or dead.

The record stands in a file beside the error file that torchrun's agent names, so that ranks started by `weft train` and
by torchrun both have one; elsewhere it is memory of the rank alone. A note costs a microsecond or two.
"""

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LAYOUT = struct.Struct("<qqqqqq?d64s")  # pid, rank, step, stage, microbatch, awaited rank, gave up, since, operation
_GAVE_UP_AT = struct.calcsize("<qqqqqq")
_NONE = -1
_SIZE = 256
_STATES = {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}  # letters of proc(5)


@dataclass(frozen=True)
class Whereabouts:
    """What a rank was doing when its record was read.

    Attributes:
        step: from 0; None before the first and outside of steps.
        operation: such as `forward` or `saving`.
        stage, microbatch: of the pipeline; None where the operation has none.
        awaits: the rank whose message it waits for, if any.
        gave_up: it waited for another rank for too long and has left.
        since: when it began, in seconds of `time.monotonic`, which all processes of a machine share.
        pid: its process.
    """

    rank: int
    step: int | None
    operation: str
    stage: int | None
    microbatch: int | None
    awaits: int | None
    gave_up: bool
    since: float
    pid: int

    def __str__(self) -> str:
        words = f"in the {self.operation}" if self.operation else "at its start"
        if self.microbatch is not None:
            words += f" of microbatch {self.microbatch} on stage {self.stage}"
        if self.step is not None:
            words += f" in step {self.step + 1}"
        return words

    @property
    def process(self) -> str:
        """`stopped` by a signal or a debugger, `gone`, or empty while it runs or where that cannot be known."""
        if not self.pid or not Path("/proc/self").exists():
            return ""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return "gone"
        return _STATES.get(status.rpartition(")")[2].split()[0], "")


class RankRecord:
    """The record of this process's rank; others read it with `read_records`.

    Args:
        path: of its file; None keeps it to this process.
        rank: in the job.
    """

    def __init__(self, path: Path | None = None, *, rank: int = 0) -> None:
        self.path = path
        self._rank = rank
        self._memory = _map(path)
        self._now = (_NONE, _NONE, _NONE)  # step, stage, microbatch
        self._operation = b""
        self._gave_up = False
        self._write(_NONE)

    @property
    def directory(self) -> Path | None:
        """Where the records of the other ranks of this machine stand."""
        return self.path.parent if self.path else None

    def begin_step(self, step: int | None) -> None:
        """Note the step, numbered from 0; None outside of steps."""
        self._now = (_NONE if step is None else step, _NONE, _NONE)
        self._write(_NONE)

    def enter(self, operation: str, stage: int = _NONE, microbatch: int = _NONE) -> None:
        """Note what begins now; it ends where the next thing begins."""
        self._now = (self._now[0], stage, microbatch)
        self._operation = operation.encode()
        self._write(_NONE)

    def await_rank(self, rank: int | None) -> None:
        """Note that a message of `rank` is waited for; None when it has come."""
        self._write(_NONE if rank is None else rank)

    def give_up(self) -> None:
        """Note that this rank has waited for another one for too long."""
        self._gave_up = True
        self._memory[_GAVE_UP_AT] = 1

    def read(self) -> Whereabouts:
        """What the others see."""
        return _parse(self._memory[:])

    def close(self) -> None:
        """Remove the file: this rank has ended as it should."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def _write(self, awaited: int) -> None:
        step, stage, microbatch = self._now
        _LAYOUT.pack_into(
            self._memory,
            0,
            os.getpid(),
            self._rank,
            step,
            stage,
            microbatch,
            awaited,
            self._gave_up,
            time.monotonic(),
            self._operation,
        )


def open_record(environment: Mapping[str, str]) -> RankRecord:
    """The record of the rank that the environment names; in a file where torchrun's agent has started it."""
    path = record_path(environment)
    rank = int(environment.get("RANK", "0"))
    try:
        return RankRecord(path, rank=rank)
    except OSError:  # a full disk must not keep a rank from starting
        return RankRecord(rank=rank)


def record_path(environment: Mapping[str, str]) -> Path | None:
    """Beside the error file of the rank; torchrun gives each rank a folder for it, named by the local rank."""
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or "RANK" not in environment:
        return None
    folder = Path(error_file).parent
    if folder.name == environment.get("LOCAL_RANK"):
        folder = folder.parent
    return folder / f"rank-{environment['RANK']}-record"


def read_records(directory: Path) -> list[Whereabouts]:
    """The records of the ranks of this machine, by rank; of those that have ended as they should there is none."""
    found = (_read(path) for path in directory.glob("rank-*-record"))
    return sorted((record for record in found if record), key=lambda record: record.rank)


def read_record(directory: Path, rank: int) -> Whereabouts | None:
    """The record of one rank, if there is one."""
    return _read(directory / f"rank-{rank}-record")


def _read(path: Path) -> Whereabouts | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return _parse(content) if len(content) >= _LAYOUT.size else None


def _parse(content: bytes) -> Whereabouts:
    pid, rank, step, stage, microbatch, awaited, gave_up, since, operation = _LAYOUT.unpack_from(content)
    return Whereabouts(
        rank,
        _known(step),
        operation.rstrip(b"\0").decode(errors="replace"),
        _known(stage),
        _known(microbatch),
        _known(awaited),
        gave_up,
        since,
        pid,
    )


def _known(number: int) -> int | None:
    return None if number == _NONE else number


def _map(path: Path | None) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, _SIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() < _SIZE:  # written, not only made longer: a mapped page without a block kills on a full disk
            file.write(bytes(_SIZE))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SIZE)
