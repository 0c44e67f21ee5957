"""Starts the ranks of a job through torchrun's own agent, and sees to it that they end together.

A rank that fails brings the others down within seconds and is the one that is named. Ctrl-C, SIGTERM and SIGUSR1 are
passed on, so that the ranks finish their step and save; a second one ends them at once. No rank outlives the launcher.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from weft.launch.agent import PEER_SECONDS, Agent, RankLogs
from weft.launch.errors import RunError, StoppedError
from weft.launch.rendezvous import BoundedRendezvous, one_node, rank_environment, several_nodes, store_for_each_start
from weft.launch.signals import STARTED

HUNG = 1.25
"""Times the limit of a wait after which the launcher itself ends a rank that does not get on."""


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        target: `package.module:function`, called as `function(config, overrides)` on every rank.
        ranks_per_node: processes to start here.
        nodes: launchers that start as many processes each; at most, where fewer are allowed.
        fewest_nodes: with how many of them the job begins and goes on.
        logs: folder for the output of all ranks but rank 0, whose output is the launcher's own.
        timeout: longest wait for the other nodes, in seconds.
        stop_timeout: longest time for the ranks to finish their step and save after a signal, in seconds.
        max_restarts: how often the ranks are started again after one has failed.
    """

    target: str
    config: str
    overrides: tuple[str, ...]
    ranks_per_node: int
    logs: Path
    nodes: int = 1
    fewest_nodes: int = 1
    timeout: int = 600
    stop_timeout: int = 30
    max_restarts: int = 0


def launch(job: Job) -> None:
    """Run the job to its end.

    Raises:
        UserError, RunError: a rank failed; the message is that of the rank that failed first.
        StoppedError: SIGINT, SIGTERM or SIGUSR1 ended the job.
    """
    logs = job.logs / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    variables = rank_environment(job.nodes) | {STARTED: str(time.monotonic())}
    _silence_agent()
    with store_for_each_start():
        _run(job, RankLogs(logs, variables))


def _run(job: Job, logs: RankLogs) -> None:
    meeting = BoundedRendezvous(get_rendezvous_handler(_rendezvous(job)), min(60, job.timeout))
    limit = HUNG * job.timeout + PEER_SECONDS
    agent = Agent(_worker_spec(job, meeting), logs, limit=limit, stop_timeout=job.stop_timeout)
    try:
        result = agent.run()
    except SignalException as error:
        raise StoppedError(error.sigval, clean=agent.exited_cleanly()) from None
    except RendezvousError as error:
        raise _lost(job) from error
    finally:
        agent.close()
        meeting.leave()
        _show_cursor()
    if result.is_failed():
        assert agent.error is not None
        raise agent.error


def _lost(job: Job) -> RunError:
    where = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '0')}"
    return RunError(
        f"The nodes did not meet at {where} in time, or the way there was lost; start the same command again on this "
        "node when it can be reached."
    )


def _silence_agent() -> None:
    """Keep the agent's own account of stops and failures off the terminal; each of its modules has its own logger."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).disabled = True


def _show_cursor() -> None:
    """A progress bar hides the cursor, and a rank that was killed cannot bring it back."""
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)


def _worker_spec(job: Job, meeting: BoundedRendezvous) -> WorkerSpec:
    return WorkerSpec(
        role="rank",
        local_world_size=job.ranks_per_node,
        entrypoint=sys.executable,
        args=("-m", "weft.launch.rank", str(os.getpid()), job.target, job.config, *job.overrides),
        rdzv_handler=meeting,
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1" if job.nodes == 1 else None,
    )


def _rendezvous(job: Job) -> RendezvousParameters:
    if job.nodes == 1:
        return one_node(os.environ, timeout=job.timeout)
    nodes = (job.fewest_nodes, job.nodes)
    elastic = job.max_restarts > 0 or job.fewest_nodes < job.nodes
    return several_nodes(os.environ, nodes=nodes, elastic=elastic, timeout=job.timeout)
