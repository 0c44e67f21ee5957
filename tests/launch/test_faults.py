"""Runs that are disturbed, whoever has started them: they say what happened where, leave nothing behind, and go on."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import faults
from tests.launch.test_train import environment, folder, losses  # noqa: F401  (a fixture)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_a_few_faults_lose_nothing(tmp_path: Path) -> None:
    """The benchmark with one run and two faults, of which one takes a whole time limit to be noticed."""
    by_name = {kind.name: kind for kind in faults.KINDS}
    kinds = [by_name["a rank stopped (SIGSTOP)"], by_name["the whole job killed in a save"]]
    tally = faults.Tally()
    undisturbed = faults.undisturbed_losses(tmp_path, "pipeline")
    run = faults.prepare(tmp_path / "run", "pipeline")
    faults.disturbed_run(run, kinds, random.Random(1), tally)
    assert tally.faults == 2
    assert run.losses() == undisturbed
    assert (tally.checkpoints_lost, tally.orphans, faults.count_survivors(run.folder)) == (0, 0, 0)
    assert re.search(
        r"rank ([01]) is behind: it has been in the [a-z ]+( of microbatch \d on stage \1)?( in step \d+)? for \d+ s, "
        r"and its process is stopped\. Starting again \(restart 1 of 1000\)\.",
        run.said(),
    ), run.said()


WHERE = r"in the forward of microbatch 1 on stage 1"
SENTENCES = {
    "SIGKILL": rf"no gradient of microbatch \d arrived from rank 1 \(stage 1\): the connection to rank 1 .* is "
    rf"lost; rank 1 was {WHERE}",
    "SIGSTOP": rf"within 5 s; rank 1 is behind: it has been {WHERE} for \d+ s, and its process is stopped",
}


@pytest.mark.parametrize("fate", SENTENCES)
def test_a_script_of_ones_own_under_torchrun_ends_and_names_the_rank(tmp_path: Path, fate: str) -> None:
    script = Path(__file__).with_name("pipeline_script.py")
    command = [*TORCHRUN, "--nproc-per-node", "2", str(script), fate]
    mark = os.environ | {faults.MARK: str(tmp_path), "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(command, env=mark, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    if fate == "SIGSTOP":
        let_the_stopped_rank_end(torchrun)
    _, said = torchrun.communicate(timeout=280)
    assert torchrun.returncode == 1
    assert re.search(SENTENCES[fate], said), said
    assert faults.count_survivors(tmp_path) == 0


def let_the_stopped_rank_end(torchrun: subprocess.Popen[str]) -> None:
    """Wake it when the other one has given up: torchrun would wait 30 s for it to heed its SIGTERM."""
    ranks: list[psutil.Process] = []

    def states() -> list[str]:
        ranks[:] = psutil.Process(torchrun.pid).children()
        return sorted(rank.status() for rank in ranks if rank.status() != psutil.STATUS_ZOMBIE)

    assert faults.wait_until(lambda: psutil.STATUS_STOPPED in states())
    assert faults.wait_until(lambda: states() == [psutil.STATUS_STOPPED])
    for rank in ranks:
        faults.send(rank, signal.SIGCONT)


def test_a_rank_more_than_the_layout_takes_stands_by_where_restarts_are_allowed(folder: Path) -> None:  # noqa: F811
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "weft.launch.train", "tiny.yaml"]
    done = subprocess.run(
        [*command, "parallel.tensor=1", "parallel.pipeline=1", "parallel.data=1", "train.steps=2"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "on one process\n" in done.stderr
    assert len(losses(folder / "runs/tiny")) == 2
