"""Moves values between the ranks of a pipeline: bounded waits, sends that block nobody, receives in the sender's order.

Every (source, destination) pair is a lane: a queue whose receives are posted in the order of the source's sends, so the
two ends always agree on what comes next. An activation's shapes travel ahead of it in a small header; it is sent with
the first activation of a stage in a step and, unless that one says that all microbatches look alike, with each of
them. A gradient needs no header: its receiver has sent the activation that it belongs to.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from weft.parallel.blame import blame, last_seen
from weft.parallel.links import Arrival, Link
from weft.parallel.pipeline.channels import Channels
from weft.parallel.pipeline.payload import PayloadSpec, TensorSpec
from weft.parallel.pipeline.table import Schedule, Value, name_in_words
from weft.parallel.records import RankRecord

DATA, HEADER, LOSS, SHARED = range(4)  # message tags
HEADER_BYTES = 512


class PipelineError(RuntimeError):
    """A rank of the pipeline did not do its part in time, or is gone."""


class Transport:
    """Point-to-point messages within the pipeline group, each wait bounded by `timeout` seconds.

    `record`: where this rank notes what it waits for.
    """

    def __init__(
        self,
        channels: Channels,
        schedule: Schedule,
        device: torch.device,
        timeout: float,
        record: RankRecord | None = None,
    ) -> None:
        self.channels = channels
        self.group = channels.control
        self.rank = dist.get_rank(self.group)
        self.device = device
        self.timeout = timeout
        self.record = record or RankRecord()
        self._schedule = schedule

    def send(self, tensor: Tensor, peer: int, tag: int, what: Callable[[], str]) -> "Pending":
        """Start sending; `tensor` must stay unchanged until the returned work is done."""
        link = self._link(tensor, peer)
        try:
            if link is not None:
                link.send(tensor, tag)
                return None
            group, destination = self._route(self.rank, peer, peer, tag)
            return self._pending(dist.isend(tensor, group=group, group_dst=destination, tag=tag), tag)
        except RuntimeError as error:
            raise self._gone(peer, what) from error

    def receive(self, tensor: Tensor, peer: int, tag: int, what: Callable[[], str]) -> "Pending":
        """Start receiving into `tensor`."""
        link = self._link(tensor, peer)
        if link is not None:
            return OverLink(link.receive(tensor.dtype, tensor.shape, tag), tensor)
        try:
            group, source = self._route(peer, self.rank, peer, tag)
            return self._pending(dist.irecv(tensor, group=group, group_src=source, tag=tag), tag)
        except RuntimeError as error:
            raise self._gone(peer, what) from error

    def _link(self, tensor: Tensor, peer: int) -> Link | None:
        return self.channels.links.get(peer) if tensor.device.type == "cpu" else None

    def _route(self, source: int, destination: int, peer: int, tag: int) -> tuple[dist.ProcessGroup, int]:
        return (self.group, peer) if tag in (HEADER, LOSS) else self.channels.lane(source, destination, peer)

    def _pending(self, work: dist.Work | None, tag: int) -> "Pending":
        assert work is not None, "this rank is not in the pipeline's group"
        return work if self.channels.bounded or tag in (HEADER, LOSS) else OnStream(work)

    def wait(self, work: "Pending", peer: int, what: Callable[[], str]) -> None:
        """Wait until `work` is done; None is.

        Raises:
            PipelineError: `what` has not happened within the time limit, or the peer has gone.
        """
        if work is None:
            return
        started, limit = perf_counter(), timedelta(seconds=self.timeout)
        try:
            if isinstance(work, OverLink) and work.is_there():  # nothing to wait for, so nothing to note
                work.wait(limit)
                return
            self.record.await_rank(self._in_job(peer))
            work.wait(limit)
        except RuntimeError as error:
            if perf_counter() - started < 0.99 * self.timeout:
                raise self._gone(peer, what) from error
            raise PipelineError(f"{self.here()}: {what()} within {self.timeout:g} s{blame(self.record)}") from error
        self.record.await_rank(None)

    def here(self) -> str:
        """This rank in words: `rank 3 (stage 3 of 4)`."""
        return self.name_rank(self.rank, f" of {self._schedule.stages}")

    def name_rank(self, rank: int, suffix: str = "") -> str:
        """A rank of the pipeline in words, by its rank in the job and its stages."""
        stages = self._schedule.stages_of(rank)
        plural = "s" if len(stages) > 1 else ""
        listed = " and ".join(map(str, stages))
        return f"rank {self._in_job(rank)} (stage{plural} {listed}{suffix})"

    def _in_job(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _gone(self, peer: int, what: Callable[[], str]) -> PipelineError:
        seen = last_seen(self.record, self._in_job(peer))
        return PipelineError(f"{self.here()}: {what()}: the connection to {self.name_rank(peer)} is lost{seen}")


class OnStream:
    """A message of NCCL: the stream waits for it, not the CPU; NCCL's watchdog holds to the lane's time limit.

    Given a limit, NCCL's own wait would keep the CPU until the message is through.
    """

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self, _: timedelta) -> bool:
        return self._work.wait()


class OverLink:
    """A message from a rank of this machine, to be put into `tensor`."""

    def __init__(self, arrival: Arrival, tensor: Tensor) -> None:
        self._arrival, self._tensor = arrival, tensor

    def is_there(self) -> bool:
        return self._arrival.is_there()

    def wait(self, timeout: timedelta) -> bool:
        self._arrival.wait(timeout)
        self._arrival.move_into(self._tensor)
        return True


Pending = dist.Work | OnStream | OverLink | None
"""A message under way; None is one that has left already."""


class Shapes:
    """What is known in one step about what stages hand on: announced by headers, or fixed beforehand for outputs."""

    def __init__(self, fixed: Mapping[int, PayloadSpec], skips: Mapping[str, tuple[int, int]]) -> None:
        self._uniform: dict[tuple[str, int], PayloadSpec] = {("act", stage): spec for stage, spec in fixed.items()}
        self._single: dict[Value, PayloadSpec] = {}
        self._skips = skips

    def of(self, value: Value) -> PayloadSpec | None:
        """Of what an output or a skip consists, or None when its header has not come or gone."""
        return self._uniform.get(value[:2]) or self._single.get(value)

    def announce(self, value: Value, spec: PayloadSpec, *, uniform: bool) -> None:
        if uniform:
            self._uniform[value[:2]] = spec
        else:
            self._single[value] = spec

    def uniform(self, value: Value) -> bool:
        return value[:2] in self._uniform

    def incoming(self, value: Value) -> Sequence[TensorSpec] | None:
        """The tensors of which a value on its way to this rank consists, or None while that is not known."""
        if not value.is_gradient:
            spec = self.of(value)
            return None if spec is None else spec.tensors
        name = value.name.removesuffix(".grad")
        source = value.stage - 1 if name == "grad" else self._skips[name][0]
        spec = self.of(Value("act" if name == "grad" else name, source, value.microbatch))
        return None if spec is None else [tensor for tensor in spec.tensors if tensor.requires_grad]


class Outbox:
    """The lane to one peer."""

    def __init__(self, transport: Transport, peer: int) -> None:
        self._transport = transport
        self._peer = peer
        self._sent: deque[tuple[Value, list[Pending], list[Tensor]]] = deque()

    def put(self, value: Value, tensors: Sequence[Tensor], header: bytes | None) -> None:
        """Start sending a value, its header first; the tensors are kept until they are known to have been taken."""
        what = partial(self._untaken, value)
        messages = [] if header is None else [(part, HEADER) for part in _header_messages(header)]
        messages += [(tensor.detach().contiguous(), DATA) for tensor in tensors]
        works = [self._transport.send(message, self._peer, tag, what) for message, tag in messages]
        self._sent.append((value, works, [message for message, _ in messages]))

    def release(self, count: int) -> None:
        """Let go of the oldest `count` values; waits for those that the peer has not taken."""
        for _ in range(count):
            value, works, _ = self._sent.popleft()
            for work in works:
                self._transport.wait(work, self._peer, partial(self._untaken, value))

    def drain(self) -> None:
        self.release(len(self._sent))

    def _untaken(self, value: Value) -> str:
        return f"{_name(value)} was not taken by {self._transport.name_rank(self._peer)}"


class Inbox:
    """The lane from one peer: `order` is what comes, in the order in which the peer sends it."""

    def __init__(self, transport: Transport, peer: int, order: Sequence[Value], shapes: Shapes) -> None:
        self._transport = transport
        self._peer = peer
        self._shapes = shapes
        self._order = deque(order)
        self._due: deque[Value] = deque()
        self._header: tuple[Tensor, Pending] | None = None
        self._arriving: dict[Value, tuple[list[Tensor], list[Pending]]] = {}

    def post(self, count: int) -> None:
        """Make the next `count` values due, and post the receives of all that are due and whose shapes are known."""
        for _ in range(count):
            self._due.append(self._order.popleft())
        self._post_due()

    def take(self, value: Value) -> list[Tensor]:
        """Wait for a value that is due."""
        while value not in self._arriving:
            if not self._due[0].is_gradient and self._shapes.incoming(self._due[0]) is None:
                self._read_header(self._due[0])
            self._post_due()
        tensors, works = self._arriving.pop(value)
        for work in works:
            self._wait(value, work)
        return tensors

    def _post_due(self) -> None:
        while self._due:
            value = self._due[0]
            specs = self._shapes.incoming(value)
            if specs is None:
                self._post_header(value)
                return
            self._due.popleft()
            tensors = [spec.empty(self._transport.device) for spec in specs]
            self._arriving[value] = tensors, [self._receive(value, tensor, DATA) for tensor in tensors]

    def _post_header(self, value: Value) -> None:
        if self._header is None and not value.is_gradient:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            self._header = header, self._receive(value, header, HEADER)

    def _read_header(self, value: Value) -> None:
        self._post_header(value)
        assert self._header is not None
        first, work = self._header
        self._header = None
        self._wait(value, work)
        rest = torch.empty(max(0, _header_length(first) - HEADER_BYTES), dtype=torch.uint8)
        if rest.numel():
            self._wait(value, self._receive(value, rest, HEADER))
        spec, uniform = PayloadSpec.decode(_header_content(first, rest))
        self._shapes.announce(value, spec, uniform=uniform)

    def _receive(self, value: Value, tensor: Tensor, tag: int) -> Pending:
        return self._transport.receive(tensor, self._peer, tag, lambda: self._missing(value))

    def _wait(self, value: Value, work: Pending) -> None:
        self._transport.wait(work, self._peer, lambda: self._missing(value))

    def _missing(self, value: Value) -> str:
        return f"no {_name(value).removeprefix('the ')} arrived from {self._transport.name_rank(self._peer)}"


def _name(value: Value) -> str:
    return f"{name_in_words(value)} of microbatch {value.microbatch}"


def _header_messages(header: bytes) -> list[Tensor]:
    """A message of fixed size that begins with the header's length, and one with what does not fit there."""
    content = (len(header) + 8).to_bytes(8, "little") + header
    content += bytes(max(0, HEADER_BYTES - len(content)))
    message = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return [part for part in (message[:HEADER_BYTES], message[HEADER_BYTES:]) if part.numel()]


def _header_length(first: Tensor) -> int:
    return int.from_bytes(first[:8].numpy().tobytes(), "little")


def _header_content(first: Tensor, rest: Tensor) -> bytes:
    return torch.cat([first, rest]).numpy().tobytes()[8 : _header_length(first)]
