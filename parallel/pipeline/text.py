"""Schedules as CSV, in the text form of torch.distributed.pipelining: one row per rank, one action per cell.

A cell is `2F0` (forward of microbatch 0 on stage 2; F, B, I or W), `(2F1;2B0)OVERLAP_F_B` for a forward and a backward
that run interleaved, or empty for a wait. Waits are not read: they follow from the dependencies. Neither are torch's
cells for communication and for sharded parameters (`2SEND_F0`, `2UNSHARD`, …), which weft derives or does elsewhere.
"""

import csv
import re
from pathlib import Path

from weft.parallel.pipeline.table import Action, Schedule, ScheduleError

OVERLAP = "OVERLAP_F_B"
_DERIVED = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_OVERLAPPED = re.compile(rf"\(([^;]+);([^;]+)\){OVERLAP}")


def read_schedule(path: str | Path) -> Schedule:
    """Read a schedule from a CSV file; its name is the file's.

    Raises:
        ScheduleError: a cell is no action; the message names row and column. The schedule is not proved here.
        OSError: the file cannot be read.
    """
    path = Path(path)
    overlapped: set[Action] = set()
    programs = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for row, cells in enumerate(csv.reader(file), start=1):
                if cells:
                    programs.append(_read_row(cells, f"{path}, row {row}", overlapped))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ScheduleError(
                f"{path} is no CSV text ({error}); write one row per rank and one action per cell"
            ) from None
    if not programs:
        raise ScheduleError(f"{path} is empty; write one row per rank and one action per cell, such as 0F0,0B0")
    return Schedule(path.stem, programs, overlapped=frozenset(overlapped))


def write_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule as CSV, without cells for waits."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for rank in range(schedule.ranks):
            writer.writerow([_cell(block) for block in schedule.blocks(rank)])


def _read_row(cells: list[str], where: str, overlapped: set[Action]) -> list[Action]:
    program = []
    for column, cell in enumerate(cells, start=1):
        text = cell.strip()
        if not text or _DERIVED.fullmatch(text):
            continue
        pair = _OVERLAPPED.fullmatch(text)
        try:
            actions = [Action.parse(part) for part in (pair.groups() if pair else (text,))]
        except ScheduleError as error:
            raise ScheduleError(f"{where}, column {column}: {error}") from None
        if pair:
            overlapped.add(actions[0])
        program += actions
    return program


def _cell(block: tuple[Action, ...]) -> str:
    return str(block[0]) if len(block) == 1 else f"({block[0]};{block[1]}){OVERLAP}"
