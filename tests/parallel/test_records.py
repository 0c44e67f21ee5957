"""Records of ranks: others read what was noted last, and find the rank that holds the others up."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weft.parallel.blame import behind, blame
from weft.parallel.records import RankRecord, Whereabouts, open_record, read_record, read_records, record_path


def at(rank: int, since: float, *, awaits: int | None = None, gave_up: bool = False) -> Whereabouts:
    return Whereabouts(rank, 4, "forward", 1, 2, awaits, gave_up, since, pid=0)


def test_others_read_what_was_noted_last(tmp_path: Path) -> None:
    record = RankRecord(tmp_path / "rank-3-record", rank=3)
    record.begin_step(11)
    record.enter("weight gradient", 2, 7)
    record.await_rank(5)
    seen = read_record(tmp_path, 3)
    assert seen is not None
    assert str(seen) == "in the weight gradient of microbatch 7 on stage 2 in step 12"
    assert (seen.rank, seen.awaits, seen.gave_up, seen.pid) == (3, 5, False, os.getpid())
    record.await_rank(None)
    record.begin_step(None)
    record.enter("saving of a checkpoint")
    record.give_up()
    (seen,) = read_records(tmp_path)
    assert (str(seen), seen.awaits, seen.gave_up) == ("in the saving of a checkpoint", None, True)
    assert seen == record.read()
    record.close()
    assert read_records(tmp_path) == []


def test_a_record_outlives_its_process_and_says_what_became_of_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, weft.parallel.records as records\n"
        "record = records.RankRecord(pathlib.Path(sys.argv[1]) / 'rank-1-record', rank=1)\n"
        "record.enter('backward', 0, 3)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    seen = read_record(tmp_path, 1)
    assert seen is not None
    assert (str(seen), seen.process) == ("in the backward of microbatch 3 on stage 0", "stopped")
    process.kill()
    process.communicate()
    assert seen.process == "gone"
    own = RankRecord(tmp_path / "rank-0-record", rank=0)
    assert blame(own, patience=0.05).startswith(
        "; rank 1 is behind: it has been in the backward of microbatch 3 on stage 0 for "
    )


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ([at(0, 1.0, gave_up=True), at(1, 3.0), at(2, 2.0, gave_up=True)], 1),
        ([at(0, 1.0, awaits=1), at(1, 3.0), at(2, 2.0, awaits=1)], 1),
        ([at(0, 1.0, awaits=1), at(1, 3.0), at(2, 2.0)], 2),
        ([at(0, 3.0, awaits=1), at(1, 1.0, awaits=0)], 1),
        ([at(0, 1.0, gave_up=True), at(1, 3.0, gave_up=True)], None),
        ([], None),
    ],
    ids=["the one that has not given up", "not one that waits", "the longest", "waiting in a ring", "all", "none"],
)
def test_the_rank_behind(records: list[Whereabouts], found: int | None) -> None:
    rank = behind(records)
    assert (rank.rank if rank else None) == found


def test_ranks_of_torchrun_and_of_weft_have_files_and_others_do_not(tmp_path: Path) -> None:
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0/1/error.json")}
    assert record_path(torchrun) == tmp_path / "attempt_0/rank-5-record"
    weft = torchrun | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "logs/rank-5-error.json")}
    assert record_path(weft) == tmp_path / "logs/rank-5-record"
    assert open_record(weft).path == tmp_path / "logs/rank-5-record"
    assert open_record({"RANK": "5"}).path is None
    (tmp_path / "full").write_text("not a folder")
    assert open_record(weft | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "full/error.json")}).path is None
