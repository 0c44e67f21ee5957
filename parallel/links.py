"""Messages between two ranks of one machine, through shared memory.

Over gloo a message of two processes of one machine passes the TCP stack, is sent only when its receiver has said that
it is ready, and wakes a thread on either side. Over a link the sender copies it into memory that both map and says so
in a few bytes on a Unix socket; the receiver, woken once, reads it where it lies. A send waits for nobody, so it
cannot hang; a receive has a time limit, and learns at once when the other process has ended.
"""

import os
import select
import socket
import struct
import time
from collections import Counter
from datetime import timedelta

import torch
from torch import Tensor

from weft.parallel.shared_memory import Segment, SegmentPool
from weft.parallel.traffic import note_message

_MESSAGE = struct.Struct("<iiq")  # tag, segment, bytes
_ROOM_FOR_DESCRIPTOR = socket.CMSG_SPACE(struct.calcsize("i"))


class LinkError(RuntimeError):
    """The other rank did not send in time, or is gone."""


class Link:
    """One rank's end of the connection to another one; for the thread that computes alone.

    Messages of one tag arrive in the order in which they were sent.

    Args:
        connection: a connected Unix socket of packets.
        peer: the other rank, in words of the group.
        timeout: seconds that a wait may take when it names no other limit.
        group: name and size of the process group, for counting what is sent.
        spin: seconds that a wait looks for its message over and over before it sleeps; for ranks that have a core each.
    """

    def __init__(
        self, connection: socket.socket, peer: int, timeout: float, group: tuple[str, int], *, spin: float = 0.0
    ) -> None:
        connection.setblocking(False)
        self.peer = peer
        self._connection = connection
        self._timeout = timeout
        self._group = group
        self._spin = spin
        self._outgoing = SegmentPool()
        self._incoming: list[Segment] = []
        self._awaited, self._received = Counter[int](), Counter[int]()
        self._arrived: dict[tuple[int, int], tuple[Segment, int]] = {}
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    @property
    def segments(self) -> int:
        """How many pieces of memory what this end has sent has taken: as many as were ever under way at once."""
        return self._outgoing.segments

    def send(self, x: Tensor, tag: int = 0) -> None:
        """Send the contiguous `x`, which may be changed or freed afterwards.

        Raises:
            LinkError: the other rank has gone.
        """
        segment, descriptor = self._outgoing.take(x.nbytes)
        segment.write(x)
        try:
            self._say(_MESSAGE.pack(tag, segment.number, x.nbytes), descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        note_message("send", x.nbytes, *self._group)

    def receive(self, dtype: torch.dtype, shape: torch.Size, tag: int = 0) -> "Arrival":
        """Await the next message with this tag that no earlier call awaits."""
        number = self._awaited[tag]
        self._awaited[tag] += 1
        note_message("receive", shape.numel() * dtype.itemsize, *self._group)
        return Arrival(self, (tag, number), dtype, shape)

    def has(self, key: tuple[int, int]) -> bool:
        """Whether that message is there, without waiting for it."""
        while key not in self._arrived and self._take_next():
            pass
        return key in self._arrived

    def wait_for(self, key: tuple[int, int], timeout: timedelta | None) -> tuple[Segment, int]:
        """The message of that tag and number, with its bytes; each can be asked for once."""
        if not self.has(key) and not self._spin_for(key):
            seconds = self._timeout if timeout is None else timeout.total_seconds()
            deadline = time.monotonic() + seconds
            while key not in self._arrived:
                if not self._readable.poll(1e3 * max(0.0, deadline - time.monotonic())):
                    raise LinkError(f"timed out after {seconds:g} s waiting for a message of rank {self.peer}")
                self._take_next()
        return self._arrived.pop(key)

    def _spin_for(self, key: tuple[int, int]) -> bool:
        """Whether the message comes in the time that a sleeping process takes to be woken (Karlin et al. 1991)."""
        end = time.monotonic() + self._spin
        while time.monotonic() < end:
            if self.has(key):
                return True
        return False

    def _take_next(self) -> bool:
        """Take note of the next message, if there is one."""
        try:
            content, ancillary, _, _ = self._connection.recvmsg(_MESSAGE.size, _ROOM_FOR_DESCRIPTOR)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # it ended without having read everything; what it has sent is still there
        if not content:
            raise LinkError(f"the connection was closed by peer {self.peer}")
        for _, _, data in ancillary:
            (descriptor,) = struct.unpack("i", data)
            self._incoming.append(Segment(descriptor, len(self._incoming)))
            os.close(descriptor)
        tag, number, count = _MESSAGE.unpack(content)
        self._arrived[tag, self._received[tag]] = self._incoming[number], count
        self._received[tag] += 1
        return True

    def _say(self, content: bytes, descriptor: int | None) -> None:
        ancillary = []
        if descriptor is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
        deadline = None
        while True:
            try:
                self._connection.sendmsg([content], ancillary)
                return
            except BlockingIOError:
                deadline = deadline or time.monotonic() + self._timeout
                self._make_room(deadline)
            except OSError as error:
                raise LinkError(f"the connection to rank {self.peer} is lost ({error.strerror})") from error

    def _make_room(self, deadline: float) -> None:
        """Wait until the other rank has read some of hundreds of messages; read its own, or both might wait."""
        while self._take_next():
            pass
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN | select.POLLOUT)
        if not waiting.poll(1e3 * max(0.0, deadline - time.monotonic())):
            raise LinkError(f"timed out after {self._timeout:g} s: rank {self.peer} reads no message")


class Arrival:
    """A message that is awaited: `wait` for it, use it, `release` it."""

    def __init__(self, link: Link, key: tuple[int, int], dtype: torch.dtype, shape: torch.Size) -> None:
        self._link, self._key = link, key
        self._dtype, self._shape = dtype, shape
        self._segment: Segment | None = None

    def is_there(self) -> bool:
        """Whether `wait` would return at once."""
        return self._segment is not None or self._link.has(self._key)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is there.

        Raises:
            LinkError: it has not come in time, the sender is gone, or it is none of this size.
        """
        if self._segment is None:
            self._segment, count = self._link.wait_for(self._key, timeout)
            wanted = self._shape.numel() * self._dtype.itemsize
            if count != wanted:
                raise LinkError(
                    f"rank {self._link.peer} sent {count} bytes where {wanted} were expected; do all ranks call the "
                    "same collectives in the same order?"
                )
        return True

    @property
    def tensor(self) -> Tensor:
        """What has come, until it is released."""
        assert self._segment is not None, "wait first"
        return self._segment.view(self._dtype, self._shape)

    def move_into(self, x: Tensor) -> None:
        """Copy what has come into the contiguous `x`, and release it."""
        assert self._segment is not None, "wait first"
        self._segment.read_into(x)
        self.release()

    def release(self) -> None:
        """The sender may use the memory again."""
        assert self._segment is not None, "wait first"
        self._segment.release()
