"""Processes that are started once and form a process group of any size for each call.

Starting a process that imports torch takes seconds, a group of running processes milliseconds. Every process holds an
object of its own; a call runs one of its methods on as many ranks as it needs.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from weft.launch.errors import RunError
from weft.launch.failures import RankFailure

START_SECONDS = 300.0  # for processes to import torch on a busy machine
CONNECT_SECONDS, CONNECT_ATTEMPTS = 20.0, 3  # for processes to form a group, and how often they try
GRACE_SECONDS = 5.0  # for the other ranks to notice that one has failed


class CallError(Exception):
    """A rank failed in a call; `failure` is the rank that failed first."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(f"rank {failure.rank}: {failure.kind}: {failure.message}")
        self.failure = failure


class CallTimeoutError(Exception):
    """Some ranks did not answer in time."""

    def __init__(self, ranks: list[int], seconds: float) -> None:
        super().__init__(f"rank {' and '.join(map(str, ranks))} gave no answer within {seconds:g} s")


class Pool:
    """`size` processes over gloo; a context manager that ends them all. `timeout`: seconds that a call may take."""

    def __init__(self, size: int, *, timeout: float = 120.0) -> None:
        self.size, self.timeout = size, timeout
        self._calls = 0
        self._lessons: list[tuple[str, tuple[Any, ...]]] = []
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._workers: list[_Worker] = []
        self._fill()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(self._workers)

    def hold(self, make: Callable[[], Any]) -> None:
        """Have every process hold what `make`, which must be picklable, returns there."""
        self._lessons.clear()
        self.teach("", make)

    def call(self, ranks: int, method: str, *arguments: Any) -> list[Any]:
        """Call the method on ranks 0 … `ranks` - 1 of a new process group; returns every rank's result.

        Raises:
            CallError: a rank raised an exception or died.
            CallTimeoutError: some did not answer within the time limit; they are replaced.
            RunError: the processes did not start, or formed no group.
        """
        workers = self._connect(ranks)
        for worker in workers:
            worker.send((method, arguments))
        try:
            return self._collect(workers)
        finally:
            self._end([worker for worker in workers if worker.busy or not worker.process.is_alive()])

    def teach(self, method: str, *arguments: Any) -> None:
        """Call the method on every process by itself, and on each that is started later to replace one."""
        self._lessons.append((method, arguments))
        for worker in self._workers:
            worker.learn(method, arguments)

    def _connect(self, ranks: int) -> "list[_Worker]":
        """The workers that are the ranks of a new process group.

        On a crowded machine gloo's connections now and then fail or hang; then fresh processes try again.
        """
        for _ in range(CONNECT_ATTEMPTS):
            self._fill()
            workers = self._workers[:ranks]
            for worker in workers:
                worker.wait_until_ready()
            self._calls += 1
            for rank, worker in enumerate(workers):
                worker.send((rank, ranks, f"call{self._calls}", self.timeout))
            deadline = time.monotonic() + CONNECT_SECONDS
            if all(worker.answers(deadline) and worker.receive(0) == "connected" for worker in workers):
                return workers
            self._end(workers)
        raise RunError(f"{ranks} processes formed no group in {CONNECT_ATTEMPTS} attempts of {CONNECT_SECONDS:g} s")

    def _fill(self) -> None:
        new = [_Worker(self._store.port) for _ in range(self.size - len(self._workers))]
        self._workers += new
        for worker in new:
            for method, arguments in self._lessons:
                worker.learn(method, arguments)

    def _collect(self, workers: "list[_Worker]") -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[RankFailure] = []
        deadline = time.monotonic() + self.timeout
        while busy := {worker.connection: rank for rank, worker in enumerate(workers) if worker.busy}:
            answered = wait(list(busy), max(0.0, deadline - time.monotonic()))
            if not answered:
                break
            for connection in answered:
                rank = busy[connection]  # type: ignore[index]
                answer = workers[rank].receive(rank)
                if isinstance(answer, RankFailure):
                    failures.append(answer)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    results[rank] = answer[0]
        if failures:
            raise CallError(min(failures, key=lambda failure: failure.order))
        if len(results) < len(workers):
            raise CallTimeoutError([rank for rank, worker in enumerate(workers) if worker.busy], self.timeout)
        return [results[rank] for rank in range(len(workers))]

    def _end(self, workers: "list[_Worker]") -> None:
        for worker in workers:
            worker.process.kill()
        for worker in list(workers):
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)


class _ByValue(ForkingPickler):
    """Sends tensors by their values.

    As torch sends them, each takes a file descriptor, of which a process may have 256, and shared memory, of which a
    container may have 64 MB.
    """

    def reducer_override(self, item: Any) -> Any:
        return (torch.from_numpy, (item.numpy(),)) if type(item) is torch.Tensor else NotImplemented


class _Worker:
    """The parent's end of one process."""

    def __init__(self, port: int) -> None:
        context = _context()
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, port), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not end the pipe
        self.busy = self.ready = False

    def wait_until_ready(self) -> None:
        """Let a new process import torch; a group's time limit is for what its ranks do."""
        if not self.ready and not self.connection.poll(START_SECONDS):
            raise RunError(f"a process did not start within {START_SECONDS:g} s; is the machine overloaded?")
        if not self.ready:
            self.receive(0)

    def send(self, job: tuple[Any, ...]) -> None:
        self.busy = True
        with suppress(BrokenPipeError):  # it has died; receive says so
            self.connection.send_bytes(_ByValue.dumps(job))

    def learn(self, method: str, arguments: tuple[Any, ...]) -> None:
        self.send((method, arguments))
        self.busy = False  # a lesson has no answer

    def answers(self, deadline: float) -> bool:
        """Wait for the process's answer, or its end, until the deadline."""
        return bool(self.connection.poll(max(0.0, deadline - time.monotonic())))

    def receive(self, rank: int) -> Any:
        """A one-tuple of the method's result, or how the rank failed."""
        self.busy, self.ready = False, True
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return RankFailure(rank, self.process.exitcode or 0)


def _context() -> Any:
    """Where forking is safe, processes are forked from one that has imported torch: in a third of the time."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weft.launch.verify.inspector", "weft.launch.verify.config_model"])
    return context


def _serve(connection: Connection, port: int) -> None:
    """The process: answer calls until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's code prints is no part of the report
    torch.set_num_threads(1)  # ranks that share cores would wait for each other's threads
    connection.send("ready")
    held: Any = None
    store = TCPStore("127.0.0.1", port, is_master=False)
    while True:
        match connection.recv():
            case "", (make,):
                held = make()
            case str(lesson), arguments:
                getattr(held, lesson)(*arguments)
            case rank, ranks, name, timeout:
                group = {"store": PrefixStore(name, store), "rank": rank, "world_size": ranks}
                connection.send(_form_group(group | {"timeout": timedelta(seconds=timeout)}))
                connection.send_bytes(_ByValue.dumps(_answer(held, rank, *connection.recv())))
                _destroy_groups()


def _form_group(group: dict[str, Any]) -> str:
    """Form the default group; a rank that ended its call at once would break connections that others still make."""
    try:
        dist.init_process_group("gloo", **group)
        dist.barrier()
    except RuntimeError:
        return "not connected"
    return "connected"


def _answer(held: Any, rank: int, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return (getattr(held, method)(*arguments),)
    except Exception as error:
        words = " ".join(str(error).split())
        return RankFailure(rank, 1, type(error).__name__, words, traceback.format_exc(), time.time())


def _destroy_groups() -> None:
    """Destroy every process group; gloo's threads, which take 10 ms per peer to end, end in the background."""
    groups = list(dist.distributed_c10d._world.pg_map)
    if groups:
        dist.destroy_process_group()
        threading.Thread(target=groups.clear, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RunError("a process of the pool has no parent")
    wait([parent.sentinel])
    os._exit(1)
