"""Of several failed ranks the one whose failure caused the others' is explained."""

import json
import os
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from weft.launch.errors import RunError, UserError
from weft.launch.failures import explain, read_failures

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4711"


class Ranks:
    """Failures as ranks and the agent leave them, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: dict[int, ProcessFailure] = {}

    def raised(self, rank: int, message: str, status: int = 1) -> None:
        path = self.folder / f"rank-{rank}-error.json"
        details = {"py_callstack": f"Traceback of {rank}", "timestamp": "1700000000"}
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
        when = 1_700_000_000 * 10**9 + len(self.failures) * 1_000_000  # within one second
        os.utime(path, ns=(when, when))
        self.failures[rank] = ProcessFailure(rank, pid=1, exitcode=status, error_file=str(path))

    def died(self, rank: int, status: int) -> None:
        self.failures[rank] = ProcessFailure(rank, pid=1, exitcode=status, error_file=str(self.folder / "none.json"))

    def explain(self, *stopped: int) -> Exception:
        known = read_failures(self.failures, self.folder)
        return explain([one for one in known if one.kind or one.rank not in stopped], logs=self.folder)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_first_error_is_explained(ranks: Ranks) -> None:
    ranks.raised(3, "ValueError: first: of all\nand more")
    ranks.raised(0, "ValueError: second")
    error = ranks.explain()
    assert isinstance(error, RunError)
    assert str(error) == f"Rank 3 failed: ValueError: first: of all (traceback in {ranks.folder}/rank-3-stderr.log)"
    assert "Traceback of 3" in str(error.__cause__)


@pytest.mark.parametrize(
    "lost",
    [
        LOST,
        "DistNetworkError: Broken pipe",
        "PipelineError: rank 0 (stage 0 of 2): receiving: the connection to rank 1 (stage 1) is lost",
        "DistBackendError: NCCL communicator was aborted on rank 0.",
    ],
)
def test_lost_peers_stand_behind_what_made_them_go(ranks: Ranks, lost: str) -> None:
    ranks.raised(0, lost)
    ranks.raised(1, "IndexError: the cause")
    assert str(ranks.explain()).startswith("Rank 1 failed: IndexError: the cause")


def test_death_stands_before_lost_peers_and_the_agents_own_signals(ranks: Ranks) -> None:
    ranks.raised(0, LOST)
    ranks.died(1, -15)
    ranks.died(2, -9)
    ranks.died(3, -9)
    assert str(ranks.explain(2)).startswith("Rank 3 was killed by SIGKILL, as a machine out of memory does; the logs")
    ranks.died(3, -11)
    assert str(ranks.explain(2)).startswith("Rank 3 was killed by SIGSEGV; the logs")


def test_only_lost_peers(ranks: Ranks) -> None:
    ranks.raised(1, LOST)
    ranks.raised(0, LOST)
    assert str(ranks.explain()).startswith("Rank 1 failed: RuntimeError: [gloo")


def test_silent_exit(ranks: Ranks) -> None:
    ranks.died(1, -15)
    ranks.died(2, 3)
    assert str(ranks.explain()) == f"Rank 2 exited with status 3; the logs are in {ranks.folder}."


@pytest.mark.parametrize(("name", "kind"), [("UserError", UserError), ("RunError", RunError)])
def test_own_errors_keep_their_sentence(ranks: Ranks, name: str, kind: type[Exception]) -> None:
    ranks.raised(0, f"{name}: corpus.path is mist; choose another")
    error = ranks.explain()
    assert type(error) is kind
    assert str(error) == "corpus.path is mist; choose another"
