"""Where the launchers of a job's nodes meet, and by which address they reach each other."""

import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
)

Answer = TypeVar("Answer")

JOIN_SECONDS = 120
"""How long nodes that may come and go wait for each other at least: some may still be counted that are gone."""

LEAVE_SECONDS = 5
"""How long to wait for the end of the thread that keeps this node in the meeting."""

LAST_CALL_SECONDS = 10
"""How long a job that may begin with fewer nodes waits for the others."""

KEEP_ALIVE: dict[str, Any] = {"keep_alive_interval": 3, "keep_alive_max_attempt": 4}
"""A node of which nothing is heard for 12 seconds is gone; clocks of nodes may differ by nearly as much."""

_SIOCGIFADDR = 0x8915  # Linux, netdevice(7)


def one_node(environment: Mapping[str, str], *, timeout: int) -> RendezvousParameters:
    """A free port of this machine, or MASTER_PORT."""
    return RendezvousParameters(
        backend="c10d",
        endpoint=f"127.0.0.1:{environment.get('MASTER_PORT', '0')}",
        run_id="weft",
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host=True,
        timeout=timeout,
    )


def several_nodes(
    environment: Mapping[str, str], *, nodes: tuple[int, int], elastic: bool, timeout: int
) -> RendezvousParameters:
    """MASTER_ADDR and MASTER_PORT, on the node whose NODE_RANK is 0.

    Nodes that may come and go are numbered by their addresses, others by NODE_RANK.
    """
    common: dict[str, Any] = {"run_id": "weft", "min_nodes": nodes[0], "max_nodes": nodes[1], "timeout": timeout}
    endpoint = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    if not elastic:
        return RendezvousParameters(backend="static", endpoint=endpoint, rank=int(environment["NODE_RANK"]), **common)
    return RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        local_addr=own_address(environment["MASTER_ADDR"]),
        is_host=environment.get("NODE_RANK") == "0",
        join_timeout=max(JOIN_SECONDS, timeout),
        last_call_timeout=LAST_CALL_SECONDS,
        read_timeout=min(60, timeout),
        **KEEP_ALIVE,
        **common,
    )


class BoundedRendezvous(RendezvousHandler):
    """A rendezvous that does not wait for ever for a meeting place that is gone.

    A store whose machine has left without a word is otherwise waited for until TCP gives up, many minutes later.

    Args:
        seconds: for an answer of the store.
    """

    def __init__(self, handler: RendezvousHandler, seconds: float) -> None:
        self._handler, self._seconds = handler, seconds

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes.

        Raises:
            RendezvousError: not enough of them came, or there was no answer in time.
        """
        return _within(self._seconds + 2 * JOIN_SECONDS, self._handler.next_rendezvous)

    def num_nodes_waiting(self) -> int:
        """How many nodes wait to come in.

        Raises:
            RendezvousError: there was no answer in time.
        """
        return _within(self._seconds, self._handler.num_nodes_waiting)

    def leave(self) -> None:
        """End the thread that tells the others of this node: one that runs while Python ends can abort the process."""
        stop = getattr(self._handler, "_stop_heartbeats", None)
        if stop is not None:
            with suppress(RendezvousConnectionError):
                _within(LEAVE_SECONDS, stop)

    def get_backend(self) -> str:
        return self._handler.get_backend()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def shutdown(self) -> bool:
        return self._handler.shutdown()


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """The answer, or the error, of something that might never end and is then left behind.

    Raises:
        RendezvousConnectionError: there was no answer in time, or the store could not be reached.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except DistError as error:  # a rendezvous of fixed nodes lets the store's own through
            errors.append(RendezvousConnectionError(str(error)))
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise RendezvousConnectionError(f"no answer within {seconds:g} s")
    return answers[0]


def own_address(other: str) -> str | None:
    """The address by which this machine would reach another one; None where no way leads there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where none has, or where that cannot be asked for."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def rank_environment(nodes: int) -> dict[str, str]:
    """What the ranks of this many nodes need to reach each other and to share the machine."""
    variables = {"OMP_NUM_THREADS": "1"}  # ranks that share cores would wait for each other's threads
    if nodes == 1:
        loopback = "lo" if sys.platform == "linux" else "lo0"
        return variables | {"GLOO_SOCKET_IFNAME": loopback}  # a laptop's own name often resolves to nothing
    interface = interface_of(own_address(os.environ["MASTER_ADDR"]) or "")
    if interface and interface != "lo":
        variables["GLOO_SOCKET_IFNAME"] = interface  # a machine's own name often means its loopback
    return variables


@contextmanager
def store_for_each_start() -> Iterator[None]:
    """Give each start of the ranks a store of its own: in the agent's they would read what those before them left."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    before = os.environ.get(name)
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
