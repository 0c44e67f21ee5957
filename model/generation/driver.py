"""Rank 0 drives, the others follow: plans go out to the ranks of a replica, answers come back from its last stage."""

from collections import deque
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.model.generation.plan import HEAD, Kind, Plan, decode, encoded_length, signal
from weft.model.generation.request import Request
from weft.model.generation.scheduler import Scheduler
from weft.model.generation.worker import Worker

PLAN, ANSWER = 1, 2  # message tags


class Session:
    """A model that is ready to generate, on every rank of `mesh`: rank 0 calls `drive`, then `close`; others `follow`.

    Every data replica has a cache with the worker's slots; the groups of the scheduler are dealt over the replicas, in
    each as many as there are pipeline ranks.

    Making it is a collective call of all ranks.

    Raises:
        ValueError: the slots do not divide over the pipeline ranks.
    """

    def __init__(self, worker: Worker, mesh: DeviceMesh) -> None:
        self.worker = worker
        pipeline, self._replicas = mesh["pipeline"].size(), mesh["data"].size()
        if worker.slots % pipeline:
            raise ValueError(
                f"{worker.slots} slots do not divide over pipeline {pipeline}; choose {pipeline} or a multiple of it"
            )
        self._slots = worker.slots // pipeline
        self.scheduler = Scheduler(
            pipeline * self._replicas,
            self._slots,
            worker.capacity,
            replicas=self._replicas,
            apart=worker.config.kind == "encoder-decoder",
            renewed_at=worker.config.renewed_at,
        )
        ranks = mesh.mesh.select(2, 0)  # [pipeline, data, tensor]
        schedule = worker.placement.schedule
        last = schedule.rank_of(schedule.stages - 1)
        self._members = [ranks[:, replica].flatten().tolist() for replica in range(self._replicas)]
        self._answerers = [int(ranks[last, replica, 0]) for replica in range(self._replicas)]
        self._rank = dist.get_rank()
        self._own = next(number for number, members in enumerate(self._members) if self._rank in members)
        gloo = dist.get_backend() == "gloo" or dist.get_world_size() == 1
        self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo")
        self._timeout = timedelta(seconds=worker.timeout)
        self._answers: dict[int, Tensor] = {}
        self._arriving: dict[int, tuple[dist.Work, Tensor]] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._turn = 0

    def run(self, requests: Iterable[Request]) -> None:
        """Drive until all texts have ended."""
        for request in requests:
            self.scheduler.submit(request)
        while not self.scheduler.idle:
            self.advance()

    def advance(self) -> None:
        """Take the answer of the group whose turn it is, and start its next plan."""
        number = self._turn % self.scheduler.groups
        self._turn += 1
        if self.scheduler.under_way(number) is not None:
            self.scheduler.finish(number, self._take_answer(number))
        plan = self.scheduler.next(number)
        if plan is not None:
            self._start(number, plan)

    def keep_alive(self) -> None:
        """Tell the other ranks that there is nothing to do; they wait no longer than their time limit."""
        self._tell_all(signal(Kind.IDLE))

    def close(self) -> None:
        """Let the other ranks go."""
        self._tell_all(signal(Kind.STOP))
        self._release(0)

    def follow(self) -> None:
        """Do what rank 0 says, until it closes."""
        while (plan := self._receive_plan()).kind != Kind.STOP:
            if plan.kind == Kind.IDLE:
                continue
            answer = self.worker.run(plan)
            if answer is not None and self._rank == self._answerers[self._own]:
                self._send(answer.contiguous(), 0, ANSWER)
            self._release(2)

    def _start(self, number: int, plan: Plan) -> None:
        replica = number % self._replicas
        message = self._message(plan) if len(self._members[replica]) > 1 or replica else []
        for rank in self._members[replica]:
            if rank != 0:
                for part in message:
                    self._send(part, rank, PLAN)
        answerer = self._answerers[replica]
        if answerer != 0:
            answer = torch.empty(plan.answer_shape, dtype=torch.float64)
            work = dist.irecv(answer, group=self._group, group_src=answerer, tag=ANSWER)
            assert work is not None
            self._arriving[number] = work, answer
        if replica == 0:
            answered = self.worker.run(plan)
            if answerer == 0 and answered is not None:
                self._answers[number] = answered
        self._release(4 * dist.get_world_size())

    def _take_answer(self, number: int) -> Tensor:
        if number in self._answers:
            return self._answers.pop(number)
        work, answer = self._arriving.pop(number)
        work.wait(self._timeout)
        return answer

    def _message(self, plan: Plan) -> list[Tensor]:
        """One message of fixed length, which holds one token for each slot, and one with what does not fit there."""
        content, first = plan.encode(), self._first_length
        if len(content) > first:
            return [content[:first].clone(), content[first:].clone()]
        return [torch.nn.functional.pad(content, (0, first - len(content)))]

    @property
    def _first_length(self) -> int:
        return encoded_length(self._slots, 1)

    def _receive_plan(self) -> Plan:
        first = self._receive(self._first_length)
        length = encoded_length(int(first[2]), int(first[3])) if len(first) > HEAD else 0
        rest = self._receive(length - len(first)) if length > len(first) else first[:0]
        return decode(torch.cat((first, rest)))

    def _receive(self, length: int) -> Tensor:
        message = torch.empty(length, dtype=torch.float64)
        work = dist.irecv(message, group=self._group, group_src=0, tag=PLAN)
        assert work is not None
        work.wait(self._timeout)
        return message

    def _tell_all(self, plan: Plan) -> None:
        (message,) = self._message(plan)
        for members in self._members:
            for rank in members:
                if rank != 0:
                    self._send(message, rank, PLAN)

    def _send(self, message: Tensor, rank: int, tag: int) -> None:
        work = dist.isend(message, group=self._group, group_dst=rank, tag=tag)
        assert work is not None
        self._sent.append((work, message))

    def _release(self, kept: int) -> None:
        """Let go of what was sent but for the newest `kept` messages, waiting for those not taken yet."""
        while len(self._sent) > kept:
            self._sent.popleft()[0].wait(self._timeout)
