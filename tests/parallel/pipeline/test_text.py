"""CSV in torch's form: what is written reads back, and torch reads it too."""

import csv
from pathlib import Path

import pytest

from weft.parallel import Action, ScheduleError, build_schedule, check_schedule, read_schedule, write_schedule
from weft.parallel.pipeline.schedules import BUILDERS


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    schedule = build_schedule(name, 4, 6)
    path = tmp_path / f"{name}.csv"
    write_schedule(schedule, path)
    assert read_schedule(path) == schedule


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    torch_action = pytest.importorskip("torch.distributed.pipelining.schedules")._Action
    schedule = build_schedule("dualpipe-v", 2, 4)
    write_schedule(schedule, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = [[torch_action.from_str(cell) for cell in row] for row in csv.reader(file)]
    read = [[part for action in row for part in (action.sub_actions or (action,))] for row in rows]
    assert [[str(action) for action in row] for row in read] == [[str(a) for a in p] for p in schedule.programs]


def test_waits_and_derived_cells_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0SEND_F0,,0RECV_B0, 0B0 ,0REDUCE_GRAD\n,1RECV_F0,1F0,1I0,1W0\n\n")
    schedule = read_schedule(path)
    check_schedule(schedule)
    assert schedule.name == "mine"
    assert schedule.programs[1] == [Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0F0,0B0\n1F0,1Q0\n", "row 2, column 2: '1Q0' is no action"),
        (b"\n", "is empty"),
        (b"\xff\xfe\x00", "is no CSV text"),
        (b"0F0,1F0\n1B0\n", "1B0 is on rank 1, but stage 1 is already on rank 0"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(ScheduleError, match=message):
        read_schedule(tmp_path / "bad.csv")
