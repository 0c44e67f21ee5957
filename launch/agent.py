"""torchrun's agent as weft uses it: it ends ranks within seconds, starts them again, and finds those that hang."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext

from weft.launch.errors import FinalError, RunError, UserError, WeftError
from weft.launch.failures import RankFailure, explain, flight_recorder, read_failures
from weft.launch.nodes import Bulletin
from weft.launch.signals import STOP_SIGNALS
from weft.parallel.blame import describe
from weft.parallel.records import Whereabouts, read_records

PEER_SECONDS = 4
"""How long the ranks have to leave when another has failed; one that waits in a collective never would."""

LOOK_SECONDS = 1.0
"""Between two looks at what the ranks are doing."""


class RankLogs(LogsSpecs):
    """Rank 0 writes to the terminal, the others to `rank-N-stdout.log` and `rank-N-stderr.log`.

    Every start of the ranks has a folder of its own: `directory`, then `restart-1` in it, and so on; of several nodes
    each has its own in there, since they may share the disk.

    Args:
        variables: of the environment, for the ranks alone; those that the user has set stay as they are.
    """

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        super().__init__(str(directory))
        self.directory = directory
        self._variables = variables
        self.current = directory
        self._starts = 0

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        self.current = self.directory / f"restart-{self._starts}" if self._starts else self.directory
        self._starts += 1
        several = {env["GROUP_RANK"] for env in envs.values() if env["GROUP_WORLD_SIZE"] != "1"}
        for node in several:
            self.current /= f"node-{node}"
        self.current.mkdir(parents=True, exist_ok=True)
        variables = {**self._variables, **flight_recorder(self.current.absolute())}
        for env in envs.values():
            env |= {name: value for name, value in variables.items() if name not in os.environ}
            env["TORCHELASTIC_ERROR_FILE"] = self._path(env, "error.json")
        return LogsDest(
            stdouts={local: self._output(env, "stdout.log") for local, env in envs.items()},
            stderrs={local: self._output(env, "stderr.log") for local, env in envs.items()},
            error_files={local: env["TORCHELASTIC_ERROR_FILE"] for local, env in envs.items()},
        )

    def _path(self, env: dict[str, str], ending: str) -> str:
        return str(self.current.absolute() / f"rank-{env['RANK']}-{ending}")

    def _output(self, env: dict[str, str], ending: str) -> str:
        return "" if env["RANK"] == "0" else self._path(env, ending)

    @property
    def root_log_dir(self) -> str:
        return str(self.directory)


class Agent(LocalElasticAgent):
    """torchrun's agent with short patience for the peers of a failed rank, and a second signal that kills at once.

    Args:
        limit: seconds after which a rank that does not get on within a step is taken for hung. The other ranks should
            have given up before; this is for ranks that have none, and for when all of them hang.
        stop_timeout: seconds that the ranks have to finish their step and save when the job is stopped.

    Attributes:
        error: why the ranks ended last, when they failed.
    """

    def __init__(self, spec: WorkerSpec, logs: RankLogs, *, limit: float, stop_timeout: int) -> None:
        super().__init__(spec, logs, shutdown_timeout=stop_timeout)
        self.error: WeftError | None = None
        self.stopped_by: signal.Signals | None = None
        self._logs = logs
        self._limit = limit
        self._killed: frozenset[int] = frozenset()
        self._hung: str | None = None
        self._bulletin: Bulletin | None = None
        self._looked = 0.0

    def kill(self) -> None:
        """End every rank that is still running, with what it has started, now."""
        running = {rank: process for rank, process in self._processes() if process.poll() is None}
        self._killed |= running.keys()
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End every rank, and the listening to other nodes."""
        self.kill()
        if self._bulletin is not None:
            self._bulletin.close()

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
        self._killed, self._hung = frozenset(), None
        if self._bulletin is not None:
            self._bulletin.close()
        node, nodes = worker_group.group_rank, worker_group.group_world_size
        assert worker_group.store is not None
        assert node is not None
        assert nodes is not None
        self._bulletin = Bulletin(worker_group.store, node, nodes)
        workers: dict[int, Any] = super()._start_workers(worker_group)
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        return workers

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self._shutdown_timeout)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            _say("Another node is there: saving, to go on with it.")
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # When a rank has failed this sends SIGTERM to the others and waits 30 s for those that do not heed it.
        with _alarm(PEER_SECONDS, self.kill):
            result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            self._look()
        elif result.is_failed():
            self._take_note(result)
        return result

    def _look(self) -> None:
        """Kill the ranks when one of them hangs, or when another node says that the job has failed."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        records = read_records(self._logs.current)
        elsewhere = self._bulletin is not None and self._bulletin.tells_of_failure()
        limit = self._limit / 2 if elsewhere else self._limit  # the others have given up, so one here may be why
        if any(
            _hangs(record, self._looked, limit) or (elsewhere and record.process == "stopped") for record in records
        ):
            self._hung = describe(records, now=self._looked).removeprefix("; ").capitalize()
        if elsewhere or self._hung is not None:
            self.kill()

    def _take_note(self, result: RunResult) -> None:
        failures = read_failures(result.failures, self._logs.current)
        if self._hung is not None:
            failures = [RankFailure(-1, 1, RunError.__name__, self._hung, time=0.0)]
        else:
            failures = [failure for failure in failures if failure.kind or failure.rank not in self._killed]
        assert self._bulletin is not None
        failures += self._bulletin.exchange(failures)
        self.error = explain(failures, logs=self._logs.current)
        if isinstance(self.error, UserError | FinalError):
            self._remaining_restarts = 0
        if self._remaining_restarts > 0:
            restarts = self._worker_group.spec.max_restarts
            number = restarts - self._remaining_restarts + 1
            _say(f"{str(self.error).rstrip('.')}. Starting again (restart {number} of {restarts}).")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            self.kill()
            return
        self.stopped_by = signal.Signals(number)
        _say("Stopping after this step; the same signal again stops at once.")
        raise SignalException(f"got {self.stopped_by.name}", self.stopped_by)


def _hangs(record: Whereabouts, now: float, limit: float) -> bool:
    """Whether a rank has not got on within a step for too long; what is outside of steps may take its time."""
    return record.step is not None and now - record.since > limit


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def _alarm(seconds: float, action: Any) -> Iterator[None]:
    """Call `action` when the body takes longer than `seconds`."""
    signal.signal(signal.SIGALRM, lambda number, frame: action())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
