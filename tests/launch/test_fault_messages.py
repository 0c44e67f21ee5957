"""Every message in the table of docs/faults.md is said by weft, and every message said here is in the table."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tests.launch.message_tables import fits, matches, rows, templates
from tests.launch.test_failures import Ranks
from tests.launch.test_not_finite import broken_copy, broken_weight, passing_fault
from tests.launch.test_train import SETTINGS
from tests.parallel.checkpoint.small import alone
from tests.parallel.pipeline.serial import Block, mean_square, microbatches
from tests.pool import Pool
from weft.launch import launcher, train_command
from weft.launch.agent import Agent, RankLogs
from weft.launch.cli import run
from weft.launch.errors import RunError, StoppedError, WeftError
from weft.launch.launcher import Job, launch
from weft.launch.nodes import Bulletin
from weft.launch.preflight import check_restarts
from weft.launch.rendezvous import BoundedRendezvous, one_node
from weft.launch.replan import replan
from weft.launch.settings import Settings, build_settings
from weft.launch.signals import STARTED
from weft.launch.train import _explained, main, start
from weft.parallel import PipelineExecutor, PipelineStage, build_mesh, build_schedule
from weft.parallel.blame import blame
from weft.parallel.records import RankRecord

MODULES = (
    *(f"parallel/checkpoint/{name}.py" for name in ("load", "manifest", "shard_file")),
    *(f"parallel/pipeline/{name}.py" for name in ("run", "transport")),
    *(
        f"src/weft/launch/{name}.py"
        for name in ("agent", "checkpoint_command", "checkpoints", "failures", "launcher", "metrics", "not_finite")
    ),
    *(
        f"src/weft/launch/{name}.py"
        for name in ("replan", "replicas", "reshard", "saved_run", "train", "train_command")
    ),
)
PAGES = ("faults.md", "reliability.md")
LIMIT = 0.5
WEIGHT = "layers.0.mlp.down_proj.weight"


class Place:
    """What a scenario may use: a folder of its own, patches, workers, and what is printed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, pool: Pool, screen: StringIO) -> None:
        self.folder, self.patch, self.pool, self.screen = folder, patch, pool, screen

    def printed(self) -> list[str]:
        return self.screen.getvalue().splitlines()

    def set(self, **environment: str) -> None:
        for name, value in environment.items():
            self.patch.setenv(name, value)

    def record(self, rank: int, operation: str) -> RankRecord:
        record = RankRecord(self.folder / f"rank-{rank}-record", rank=rank)
        record.begin_step(4)
        record.enter(operation, 1, 2)
        return record


Scenario = Callable[[Place], list[str]]


# ---------------------------------------------------------------- ranks that die or fail


def failed_ranks(place: Place) -> list[str]:
    """One rank after the other is the only one that failed, each in another way."""
    place.record(2, "forward")
    said = []
    for leave in (
        lambda ranks: ranks.raised(0, "ValueError: the layer has a hole"),
        lambda ranks: ranks.died(2, -signal.SIGKILL),
        lambda ranks: ranks.died(2, -signal.SIGSEGV),
        lambda ranks: ranks.died(1, 3),
        lambda ranks: None,
    ):
        ranks = Ranks(place.folder)
        leave(ranks)
        said.append(str(ranks.explain()))
    (place.folder / "flight-recorder-rank-0").touch()
    ranks.died(1, 3)
    return [*said, str(ranks.explain())]


def agent_of(place: Place, **options: Any) -> Agent:
    job = Job("nothing:main", "none.yaml", (), 2, place.folder, **options)
    meeting = BoundedRendezvous(get_rendezvous_handler(one_node({}, timeout=30)), 30)
    agent = Agent(launcher._worker_spec(job, meeting), RankLogs(place.folder, {}), limit=0.0, stop_timeout=1)
    agent._bulletin = Bulletin(meeting.next_rendezvous().store, 0, 1)
    return agent


def hung_job(place: Place) -> list[str]:
    """The launcher finds that a rank does not get on, ends it, and starts again."""
    agent = agent_of(place, max_restarts=3)
    place.record(0, "backward")
    agent._look()
    agent._take_note(RunResult(WorkerState.FAILED))
    return [str(agent.error), *place.printed()]


def stopped_job(place: Place) -> list[str]:
    with pytest.raises(SignalException):
        agent_of(place)._stop(signal.SIGTERM, None)
    said = place.printed()
    for clean in (True, False):

        def stop(job: Job, clean: bool = clean) -> None:
            raise StoppedError(signal.SIGTERM, clean=clean)

        place.patch.setattr(launcher, "launch", stop)
        with pytest.raises(StoppedError) as caught:
            train_command._launch(Job("nothing:main", "none.yaml", (), 2, place.folder), settings())
        said.append(str(caught.value))
    return said


def settings_folder(place: Place) -> None:
    (place.folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    (place.folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    place.patch.chdir(place.folder)


def budget_spent(place: Place) -> list[str]:
    settings_folder(place)
    began = str(time.monotonic() - 9)
    place.set(
        RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        XDG_CACHE_HOME=str(place.folder),
        **{STARTED: began},
    )
    main("tiny.yaml", ["parallel.tensor=1", "parallel.pipeline=1", "train.stop_after=3s", "train.evaluate_every=0"])
    return [line for line in place.printed() if "stopped" in line]


# ---------------------------------------------------------------- ranks that hang


def wait_for_each_other(place: Place) -> list[str]:
    """Rank 1 does not come, or is stopped; is on a machine that is gone; or all wait for each other."""
    place.record(1, "forward")
    late = blame(place.record(0, "backward"), patience=0.05)
    other = subprocess.Popen(["sleep", "60"])
    other.send_signal(signal.SIGSTOP)
    os.waitpid(other.pid, os.WUNTRACED)
    content = (place.folder / "rank-1-record").read_bytes()
    (place.folder / "rank-1-record").write_bytes(other.pid.to_bytes(8, "little") + content[8:])
    stopped = blame(place.record(0, "backward"), patience=0.05)
    other.kill()
    other.wait()
    place.record(1, "forward").give_up()
    ring = blame(place.record(0, "backward"), patience=0.05)
    place.set(WORLD_SIZE="3", LOCAL_WORLD_SIZE="2")
    gone = blame(place.record(0, "backward"), patience=0.05)
    return [f"Rank 0 timed out in the backward{clause}" for clause in (late, stopped, gone, ring)]


def meet(group: dist.ProcessGroup) -> None:
    work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
    assert work is not None
    work.wait(timedelta(seconds=LIMIT))


class Meeting(Block):
    """Meets the other ranks of its group in the forward."""

    group: dist.ProcessGroup

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        meet(self.group)
        return super().forward(x, scale=scale)


def without_rank_1(axis: str, folder: Path, *, leaves: bool = False, in_step: bool = True) -> str:
    """What rank 0 says when rank 1, another stage or one that computes the same, does not do its part, or has left."""
    mesh = build_mesh(**{axis: 2})
    module, rank = (Meeting if axis == "tensor" else Block)(mesh["pipeline"].get_local_rank()), dist.get_rank()
    module.group = mesh["tensor"].get_group()
    record, done = RankRecord(folder / f"rank-{rank}-record", rank=rank), folder / "done"
    schedule = build_schedule("1f1b", mesh["pipeline"].size(), 4)
    stage = PipelineStage(module, mesh["pipeline"].get_local_rank())
    executor = PipelineExecutor(schedule, [stage], mesh["pipeline"], mean_square, record=record)
    executor._transport.timeout = LIMIT  # shorter than the groups may take to form
    record.enter("agreement after the step")
    if rank == 1:
        if leaves:
            os._exit(0)
        while not done.exists():
            time.sleep(0.02)
        return ""
    try:
        with _explained(record):
            if in_step:
                executor.step(microbatches(4, seed=1), microbatches(4, seed=2))
            else:
                meet(module.group)
    except RunError as error:
        done.write_text(str(error))
    return done.read_text()


def absent_rank(place: Place) -> list[str]:
    cases: list[tuple[str, dict[str, bool]]] = [
        ("pipeline", {}),
        ("tensor", {}),
        ("tensor", {"in_step": False}),
    ]
    said = []
    for number, (axis, how) in enumerate(cases):
        said += place.pool.run(2, without_rank_1, axis, place.folder / str(number), **how)
    with pytest.raises(ChildProcessError):
        place.pool.run(2, without_rank_1, "pipeline", place.folder / "lost", leaves=True)
    return [*filter(None, said), (place.folder / "lost/done").read_text()]


# ---------------------------------------------------------------- nodes


def no_meeting(place: Place) -> list[str]:
    place.set(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", NODE_RANK="1")  # nobody listens at that port
    with pytest.raises(RunError) as caught:
        launch(Job("nothing:main", "none.yaml", (), 1, place.folder, nodes=2, fewest_nodes=2, timeout=1))
    return [str(caught.value)]


def a_node_comes_back(place: Place) -> list[str]:
    agent = agent_of(place)
    place.patch.setattr(LocalElasticAgent, "_restart_workers", lambda self, group: None)
    agent.get_worker_group().state = WorkerState.HEALTHY
    agent._restart_workers(agent.get_worker_group())
    return place.printed()


def settings(**changes: Any) -> Settings:
    values = {"name": "run", "model": {"model_type": "llama"}, "parallel": {"pipeline": 2}}
    return build_settings(values | changes)


def too_few_nodes(place: Place) -> list[str]:
    said = []
    for refuse in (
        lambda: replan(settings(), 1, nodes=1),
        lambda: check_restarts(settings(), 0, ranks=1, nodes=1),
        lambda: check_restarts(settings(checkpoint={"resume": "never"}), 1, ranks=2, nodes=1),
    ):
        with pytest.raises(WeftError) as caught:
            refuse()
        said.append(str(caught.value))
    return said


def command_line(place: Place) -> list[str]:
    settings_folder(place)
    assert run(["train", "--nnodes", "2:1", "tiny.yaml"]) == 2
    assert run(["train", "tiny.yaml", "cluster.nodes=2"]) == 2
    assert start([]) == 2
    place.set(RANK="0", WORLD_SIZE="1")
    assert run(["train", "--max-restarts", "2", "tiny.yaml"]) == 2
    return place.printed()


# ---------------------------------------------------------------- numbers that are not finite, copies that differ


def not_finite(place: Place) -> list[str]:
    with alone():
        stop, skip = (broken_weight({}, 0, "layers.2.mlp.down_proj.weight", choice)[0] for choice in ("stop", "skip"))
        return [stop, skip, passing_fault({}, 0)[0]]


def copies(place: Place) -> list[str]:
    return [place.pool.run(ranks, broken_copy, {"data": ranks}, 1, WEIGHT)[0] for ranks in (2, 3)]


SCENARIOS: list[Scenario] = [
    failed_ranks, hung_job, stopped_job, budget_spent, wait_for_each_other, absent_rank, no_meeting, a_node_comes_back,
    too_few_nodes, command_line, not_finite, copies,
]  # fmt: skip


@pytest.fixture(scope="module")
def messages(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the scenarios say, each in a folder of its own."""
    said: list[str] = []
    before, alarm = dict(os.environ), signal.getsignal(signal.SIGALRM)
    for scenario in SCENARIOS:
        folder = tmp_path_factory.mktemp(scenario.__name__)
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as screen:
            said += scenario(Place(folder, patch, pool, screen))
        os.environ.clear()  # what a launcher sets for its ranks does not reach other tests
        os.environ.update(before)
        signal.signal(signal.SIGALRM, alarm)
    return said


@pytest.mark.parametrize("row", rows("faults.md"))
def test_each_message_of_the_page_is_said(messages: list[str], row: str) -> None:
    assert any(matches(row, message) for message in messages), "\n".join(messages)


def test_each_message_said_is_on_the_page(messages: list[str]) -> None:
    assert [message for message in messages if not any(matches(row, message) for row in rows("faults.md"))] == []


@pytest.mark.parametrize("module", MODULES)
def test_whatever_the_code_can_say_is_in_a_table(module: str) -> None:
    told = [row for page in PAGES for row in rows(page)]
    found = set(templates(module)) - {"…: … parameters on …"}  # with which a run begins
    assert found
    assert [template for template in found if not any(fits(row, template) for row in told)] == []
