"""Runs rank functions on worker processes that are started once and live as long as the test session.

    def double(x):                              # at module level of a test module
        total = x.clone()
        dist.all_reduce(total)
        return total

    def test_double(pool):
        assert pool.run(2, double, torch.ones(3)) == ...    # one result per rank

Starting a process that imports torch takes more than a second, a process group on running processes some milliseconds.
The parent keeps the one TCP store of the session; every run has a prefix of its own in it, and so a group of its own.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

START_LIMIT = 120.0  # seconds for workers to import torch, on a busy machine
CONNECT_LIMIT, CONNECT_ATTEMPTS = 20.0, 3  # seconds for workers to form a group, and how often they try
GRACE = 5.0  # seconds for the other ranks to end after one failed
DUMP_WAIT = 5.0  # seconds for a hanging worker to write its stack


class RankError(Exception):
    """Where a rank failed; the cause of the exception that `Pool.run` raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Pool:
    """Up to `size` worker processes, started when first needed, replaced when they die or hang."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._workers: list[_Worker] = []
        self._runs = 0
        self._store: Any = None
        self._directory = tempfile.TemporaryDirectory(prefix="weft-pool-")

    def run(
        self, world_size: int, function: Callable[..., Result], *args: Any, timeout: float = 60, **kwargs: Any
    ) -> list[Result]:
        """Call `function(*args, **kwargs)` on ranks 0 … world_size - 1 of a fresh gloo group; return every result.

        The group is the default group and is destroyed afterwards; RANK, LOCAL_RANK and WORLD_SIZE are set, torch's
        seed is 0. When ranks fail, the exception of the one that failed first is raised, with the worker's traceback
        as its cause. Ranks still busy after `timeout` seconds are killed, and TimeoutError names them.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world size {world_size} is not within 1 … {self.size}, the size of the pool")
        workers = self._connect(world_size, timeout)
        job = pickle.dumps((function, args, kwargs))
        for worker in workers:
            worker.send(job)
        try:
            return self._collect(workers, timeout)
        finally:  # also when the test itself was interrupted: what still runs would answer the next run
            self._drop([worker for worker in workers if worker.busy])

    def close(self) -> None:
        """Kill every worker."""
        self._drop(list(self._workers))
        self._directory.cleanup()

    def _connect(self, world_size: int, timeout: float) -> "list[_Worker]":
        """The workers that are ranks 0 … world_size - 1 of a fresh group.

        On a crowded machine gloo's connections now and then fail or hang; then fresh workers try again.
        """
        for _ in range(CONNECT_ATTEMPTS):
            workers = self._start(world_size)
            self._runs += 1
            for rank, worker in enumerate(workers):
                worker.send((rank, world_size, f"run{self._runs}", timeout))
            deadline = time.monotonic() + CONNECT_LIMIT
            if all(worker.answers(deadline) and worker.receive() == "connected" for worker in workers):
                return workers
            self._drop(workers)
        raise TimeoutError(f"the test workers formed no group in {CONNECT_ATTEMPTS} attempts of {CONNECT_LIMIT:.0f} s")

    def _start(self, count: int) -> "list[_Worker]":
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._drop([worker for worker in self._workers if not worker.process.is_alive()])
        new = [_Worker(self._store.port, Path(self._directory.name)) for _ in range(count - len(self._workers))]
        self._workers += new
        for worker in new:
            if not worker.connection.poll(START_LIMIT):
                self._drop(new)
                raise TimeoutError(f"a test worker did not start within {START_LIMIT:.0f} s")
            if worker.receive() != "ready":
                self._drop(new)
                raise ChildProcessError("a test worker ended while it started; its own message is on stderr")
        return self._workers[:count]

    def _drop(self, workers: "list[_Worker]") -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)

    def _collect(self, workers: "list[_Worker]", timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, BaseException, str]] = []
        deadline = time.monotonic() + timeout
        while busy := [worker for worker in workers if worker.busy]:
            ready = wait([worker.connection for worker in busy], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                outcome = worker.receive()
                if outcome[0] == "result":
                    results[rank] = outcome[1]
                    continue
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE)
                failures.append((outcome[1], rank, outcome[2], outcome[3]))
        if failures:
            _, rank, error, trace = min(failures, key=lambda failure: failure[0])
            raise error from RankError(f"rank {rank} of {len(workers)}: {trace}")
        if len(results) < len(workers):
            _raise_timeout(workers, timeout)
        return [results[rank] for rank in range(len(workers))]


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, port: int, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.stack_file = directory / f"stack-{id(self)}"
        self.stack_file.touch()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, port, str(self.stack_file)), daemon=True
        )
        self.process.start()
        theirs.close()  # or the end of the worker would not end the pipe
        self.busy = True

    def send(self, message: Any) -> None:
        self.busy = True
        self.connection.send(message)

    def answers(self, deadline: float) -> bool:
        """Wait for the worker's answer, or its end, until the deadline."""
        return self.connection.poll(max(0.0, deadline - time.monotonic()))

    def receive(self) -> Any:
        """The worker's answer; when it died instead, that as an error from before every other rank's."""
        self.busy = False
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            died = ChildProcessError(f"a rank's process ended with exit code {self.process.exitcode}")
            return "error", 0.0, died, "the process ended without an answer"

    def stack(self) -> str:
        """Where the worker is now."""
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
        deadline, text, before = time.monotonic() + DUMP_WAIT, "", ""
        while (not text or text != before) and time.monotonic() < deadline:  # it is written frame by frame
            time.sleep(0.05)
            before, text = text, self.stack_file.read_text()
        return text or "no Python code answered"


def _raise_timeout(workers: list[_Worker], timeout: float) -> None:
    busy = {rank: worker.stack() for rank, worker in enumerate(workers) if worker.busy}
    names = ("rank " if len(busy) == 1 else "ranks ") + ", ".join(map(str, busy))
    stacks = "\n".join(f"rank {rank}: {stack}" for rank, stack in busy.items())
    raise TimeoutError(f"{names} of {len(workers)} still ran after {timeout:g} s") from RankError(stacks)


def _serve(connection: Connection, port: int, stack_file: str) -> None:
    """The worker: answer jobs until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=open(stack_file, "w"), all_threads=True)  # noqa: SIM115
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        rank, world_size, name, timeout = connection.recv()
        with _environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size):
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            group = {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": world_size}
            try:
                dist.init_process_group("gloo", **group, timeout=timedelta(seconds=timeout))
                dist.barrier()  # a rank that failed at once would break the connections that others still make
            except RuntimeError:
                connection.send_bytes(pickle.dumps("not connected"))
                continue
            connection.send_bytes(pickle.dumps("connected"))
            connection.send_bytes(_answer(connection.recv()))
            _destroy_groups()


def _answer(job: bytes) -> bytes:
    """Call the job's function; answer with its result, or with its exception and the time of it."""
    try:
        function, args, kwargs = pickle.loads(job)
        return pickle.dumps(("result", function(*args, **kwargs)))
    except BaseException as error:
        now = time.monotonic()
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps(("error", now, error.with_traceback(None), trace))


def _destroy_groups() -> None:
    """Destroy every process group; the threads of gloo, which take 10 ms per peer to end, end in the background."""
    import torch.distributed as dist

    groups = list(dist.distributed_c10d._world.pg_map)
    if groups:
        dist.destroy_process_group()
        threading.Thread(target=groups.clear, daemon=True).start()


@contextmanager
def _environment(**variables: int) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
