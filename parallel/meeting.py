"""Opens the links between those ranks of a process group that run on one machine."""

import os
import socket
import struct
import uuid
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from weft.parallel.links import Link
from weft.parallel.shared_memory import can_share_memory
from weft.parallel.traffic import uncounted

_RANK = struct.Struct("<i")
_WAKE_UP = 50e-6  # seconds
_CREDENTIALS = struct.Struct("iII")  # pid, user, group; see unix(7), SO_PEERCRED
# A link belongs to its group and ends with it, as the connections that torch keeps for it do.
_LINKS: WeakKeyDictionary[dist.ProcessGroup, Mapping[int, Link]] = WeakKeyDictionary()


def links_of(group: dist.ProcessGroup) -> Mapping[int, Link]:
    """The links of this rank to those ranks of a gloo group that it shares memory with, by their rank in the group.

    The first call for a group is a collective call of it. Ranks meet at sockets in Linux's abstract namespace, which is
    that of their network: ranks of other machines, and of other containers, have no link. On systems that have no such
    sockets, and for other backends, there are none.
    """
    links = _LINKS.get(group)
    if links is None:
        links = _open(group) if dist.get_backend(group) == "gloo" and group.size() > 1 else {}
        _LINKS[group] = links
    return links


def _open(group: dist.ProcessGroup) -> dict[int, Link]:
    listener = _listen(group.size()) if can_share_memory() else None
    address = listener.getsockname() if listener else b""
    addresses: list[bytes] = _gather(address, group)
    found: dict[int, socket.socket] = {}
    for peer in range(group.rank()):
        connection = _connect(addresses[peer], group.rank()) if listener else None
        if connection is not None:
            found[peer] = connection
    reached: list[list[int]] = _gather(sorted(found), group)
    limit = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    if listener is not None:
        found |= _accept(listener, [peer for peer, others in enumerate(reached) if group.rank() in others], limit)
        listener.close()
    name, spin = (group.group_name, group.size()), _WAKE_UP if _has_own_core() else 0.0
    return {peer: Link(connection, peer, limit, name, spin=spin) for peer, connection in sorted(found.items())}


def _has_own_core() -> bool:
    """Whether there is a core for each rank of this machine, so that one that waits holds up nobody."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return ranks <= len(os.sched_getaffinity(0))


def _gather(value: object, group: dist.ProcessGroup) -> list:  # type: ignore[type-arg]
    gathered: list[object] = [None] * group.size()
    with uncounted():
        dist.all_gather_object(gathered, value, group=group)
    return gathered


def _listen(ranks: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0weft-{uuid.uuid4().hex}")
    listener.listen(ranks)
    return listener


def _connect(address: bytes, rank: int) -> socket.socket | None:
    """A connection to the rank that listens there; None where it is on another machine."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
        connection.send(_RANK.pack(rank))
    except OSError:
        connection.close()
        return None
    return connection


def _accept(listener: socket.socket, ranks: list[int], limit: float) -> dict[int, socket.socket]:
    """The connections that those ranks have opened; whoever is another user's process is sent away."""
    found: dict[int, socket.socket] = {}
    listener.settimeout(limit)
    while len(found) < len(ranks):
        connection, _ = listener.accept()
        _, user, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if user != os.getuid():
            connection.close()
            continue
        connection.settimeout(limit)
        (rank,) = _RANK.unpack(connection.recv(_RANK.size))
        found[rank] = connection
    return found
