"""Starts the ranks of a job through torchrun's own agent, and sees to it that they end together.

A rank that fails brings the others down within seconds and is the one that is named. Ctrl-C, SIGTERM and SIGUSR1 are
passed on, so that the ranks finish their step and save; a second one ends them at once. No rank outlives the launcher.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from weft.launch.errors import StoppedError
from weft.launch.failures import explain
from weft.launch.signals import STARTED, STOP_SIGNALS

PEER_SECONDS = 4
"""How long the ranks have to leave when another has failed; one that waits in a collective never would."""

STOP_SECONDS = 30
"""How long the ranks have to finish their step and save when the job is stopped."""


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        target: `package.module:function`, called as `function(config, overrides)` on every rank.
        ranks_per_node: processes to start here.
        nodes: launchers that start as many processes each.
        logs: folder for the output of all ranks but rank 0, whose output is the launcher's own.
        timeout: longest wait for the other nodes, in seconds.
    """

    target: str
    config: str
    overrides: tuple[str, ...]
    ranks_per_node: int
    logs: Path
    nodes: int = 1
    timeout: int = 600


def launch(job: Job) -> None:
    """Run the job to its end.

    Raises:
        UserError, RunError: a rank failed; the message is that of the rank that failed first.
        StoppedError: SIGINT, SIGTERM or SIGUSR1 ended the job.
    """
    logs = job.logs / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    _set_rank_environment(job)
    _silence_agent()
    agent = _Agent(_worker_spec(job), _RankLogs(logs), shutdown_timeout=STOP_SECONDS)
    try:
        result = agent.run()
    except SignalException as error:
        raise StoppedError(error.sigval, clean=agent.exited_cleanly()) from None
    finally:
        agent.kill()
        _show_cursor()
    if result.is_failed():
        raise explain(result.failures, stopped=agent.killed, logs=logs)


def _set_rank_environment(job: Job) -> None:
    os.environ[STARTED] = str(time.monotonic())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that share cores would wait for each other's threads
    if job.nodes == 1:
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # a laptop's own name often resolves to nothing


def _silence_agent() -> None:
    """Keep the agent's own account of stops and failures off the terminal; each of its modules has its own logger."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).disabled = True


def _show_cursor() -> None:
    """A progress bar hides the cursor, and a rank that was killed cannot bring it back."""
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)


def _worker_spec(job: Job) -> WorkerSpec:
    return WorkerSpec(
        role="rank",
        local_world_size=job.ranks_per_node,
        entrypoint=sys.executable,
        args=("-m", "weft.launch.rank", str(os.getpid()), job.target, job.config, *job.overrides),
        rdzv_handler=get_rendezvous_handler(_rendezvous(job)),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1" if job.nodes == 1 else None,
    )


def _rendezvous(job: Job) -> RendezvousParameters:
    """Where the ranks find each other: a free port of this machine, or what MASTER_ADDR and MASTER_PORT say."""
    common: dict[str, Any] = {"run_id": "weft", "min_nodes": job.nodes, "max_nodes": job.nodes, "timeout": job.timeout}
    port = os.environ.get("MASTER_PORT", "0")
    if job.nodes == 1:
        return RendezvousParameters(
            backend="c10d", endpoint=f"127.0.0.1:{port}", local_addr="127.0.0.1", is_host=True, **common
        )
    endpoint = f"{os.environ['MASTER_ADDR']}:{port}"
    return RendezvousParameters(backend="static", endpoint=endpoint, rank=int(os.environ["NODE_RANK"]), **common)


class _RankLogs(LogsSpecs):
    """Rank 0 writes to the terminal, the others to `rank-N-stdout.log` and `rank-N-stderr.log`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.directory = directory

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = self._path(env, "error.json")
        return LogsDest(
            stdouts={local: self._output(env, "stdout.log") for local, env in envs.items()},
            stderrs={local: self._output(env, "stderr.log") for local, env in envs.items()},
            error_files={local: env["TORCHELASTIC_ERROR_FILE"] for local, env in envs.items()},
        )

    def _path(self, env: dict[str, str], ending: str) -> str:
        return str(self.directory.absolute() / f"rank-{env['RANK']}-{ending}")

    def _output(self, env: dict[str, str], ending: str) -> str:
        return "" if env["RANK"] == "0" else self._path(env, ending)

    @property
    def root_log_dir(self) -> str:
        return str(self.directory)


class _Agent(LocalElasticAgent):
    """torchrun's agent with short patience for the peers of a failed rank, and a second signal that kills at once."""

    killed: frozenset[int] = frozenset()
    stopped_by: signal.Signals | None = None

    def kill(self) -> None:
        """End every rank that is still running, with what it has started, now."""
        running = {rank: process for rank, process in self._processes() if process.poll() is None}
        self.killed |= running.keys()
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)

    def exited_cleanly(self) -> bool:
        """Whether every rank was started and ended with status 0."""
        statuses = [process.poll() for _, process in self._processes()]
        return bool(statuses) and not any(status != 0 for status in statuses)

    def _processes(self) -> Iterator[tuple[int, Any]]:
        if not isinstance(self._pcontext, SubprocessContext):
            return  # nothing is started yet
        for local_rank, handler in self._pcontext.subprocess_handlers.items():
            yield self.get_worker_group().workers[local_rank].global_rank, handler.proc

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers: dict[int, Any] = super()._start_workers(worker_group)
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        return workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # When a rank has failed this sends SIGTERM to the others and waits 30 s for those that do not heed it.
        with _alarm(PEER_SECONDS, self.kill):
            result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            self.kill()
            return
        self.stopped_by = signal.Signals(number)
        print("Stopping after this step; the same signal again stops at once.", file=sys.stderr, flush=True)
        raise SignalException(f"got {self.stopped_by.name}", self.stopped_by)


@contextmanager
def _alarm(seconds: float, action: Any) -> Iterator[None]:
    """Call `action` when the body takes longer than `seconds`."""
    signal.signal(signal.SIGALRM, lambda number, frame: action())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
