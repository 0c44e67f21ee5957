"""One rank's part of the model in generation: runs plans on its stages, against its caches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.model.config import ModelConfig
from weft.model.generation.memory import open_memory
from weft.model.generation.plan import NO_LOGPROBS, Kind, Plan
from weft.model.generation.sampling import PENALTY, choose, penalize
from weft.model.generation.vocabulary import likeliest, log_normalizer, logits_of
from weft.model.stage import Stage
from weft.parallel import gather
from weft.parallel.pipeline.channels import open_channels
from weft.parallel.pipeline.table import Schedule
from weft.parallel.pipeline.transport import DATA, Pending, Transport
from weft.parallel.tensor.packed import pack_weights

HEAD_BYTES = 1 << 28
"""Memory for the logits of a score; more tokens are taken in turns."""


@dataclass(frozen=True)
class Placement:
    """Where the stages of the model lie.

    Attributes:
        stages: this rank's, by number, without sequence parallelism.
        schedule: says which pipeline rank holds which stage.
    """

    stages: dict[int, Stage]
    schedule: Schedule
    tensor: DeviceMesh
    pipeline: DeviceMesh


class Worker:
    """Runs plans for `slots` sequences of up to `capacity` tokens.

    `pack`: lay out the weights for it (`pack_weights`), after which the stages serve nothing else.

    All ranks of a replica are given the same plans in the same order. Stages hand on `[rows, queries, hidden]`; sends
    do not wait, so a rank goes on with the next plan.

    Communication: a stage's own of the tensor axis, one message from stage to stage, and on the last stage an
    all-gather of logits where a token is drawn, of one number per row and rank where the likeliest is taken.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        vocab_size: int,
        slots: int,
        capacity: int,
        timeout: float = 600.0,
        pack: bool = False,
    ) -> None:
        self.placement, self.vocab_size, self.timeout = placement, vocab_size, timeout
        self.slots, self.capacity = slots, capacity
        self.device = torch.device(placement.tensor.device_type)
        if pack:
            for stage in placement.stages.values():
                pack_weights(stage, rows=-(-slots // placement.pipeline.size()))
        stages = placement.stages.items()
        self.memories = {index: open_memory(stage, slots, capacity, self.device) for index, stage in stages}
        self._seen: Tensor | None = None
        self._sent: list[tuple[Pending, int, Tensor]] = []
        self._transport: Transport | None = None
        if placement.pipeline.size() > 1:
            channels = open_channels(placement.pipeline, self.device, timeout)
            channels.open([hop for hop in self._hops() if hop[0] != hop[1]])
            self._transport = Transport(channels, placement.schedule, self.device, timeout)

    @property
    def config(self) -> ModelConfig:
        return next(iter(self.placement.stages.values())).config

    @property
    def cache_bytes(self) -> int:
        return sum(memory.bytes for memory in self.memories.values())

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor | None:
        """Compute the plan; the ranks of the last stage get the answer, `plan.answer_shape` in float64."""
        rank, schedule = self.placement.pipeline.get_local_rank(), self.placement.schedule
        sent, answer = self._sent, None
        self._sent = []
        x: Tensor | None = plan.tokens.to(self.device)
        for index in range(schedule.stages):
            if schedule.rank_of(index) != rank:
                x = None
                continue
            if x is None:
                x = self._receive(plan.rows, self.memories[index].given(plan), schedule.rank_of(index - 1))
            memory = self.memories[index]
            if plan.parents is not None:
                memory.branch(plan, plan.parents)
            x = memory.run(plan, x)
            if index == schedule.stages - 1:
                answer = self._answer(plan, self.placement.stages[index], x)
            elif schedule.rank_of(index + 1) != rank:
                self._send(x, schedule.rank_of(index + 1))
        for work, peer, _ in sent:
            self._wait(work, peer)
        return answer

    def _hops(self) -> Iterator[tuple[int, int]]:
        rank_of = self.placement.schedule.rank_of
        for index in range(1, self.placement.schedule.stages):
            yield rank_of(index - 1), rank_of(index)

    def _answer(self, plan: Plan, stage: Stage, x: Tensor) -> Tensor:
        if plan.kind == Kind.SCORE:
            return self._score(plan, stage, x)
        if x.shape[1] > 1:
            x = x[torch.arange(plan.rows, device=self.device), plan.last.to(self.device)][:, None]
        logits = stage.logits(x)[:, 0]  # [rows, vocab / tensor]
        tokens = self._choose(plan, logits)
        if plan.top == NO_LOGPROBS:
            return tokens.double().cpu()[:, None]
        return self._with_logprobs(tokens, logits, plan.top)

    def _choose(self, plan: Plan, logits: Tensor) -> Tensor:
        tensor = self.placement.tensor
        seen = self._note_seen(plan)
        if seen is None and plan.greedy:
            return likeliest(logits, 1, tensor)[1][:, 0]
        whole = gather(logits, tensor, -1)[:, : self.vocab_size].float()
        if seen is not None:
            whole = penalize(whole, seen, plan.sampling[:, PENALTY])
        return choose(whole, plan.sampling)

    def _note_seen(self, plan: Plan) -> Tensor | None:
        """Which tokens each row holds, `[rows, vocab]`; None while no row has a repetition penalty."""
        if not plan.penalized:
            return None
        if self._seen is None:
            self._seen = torch.zeros(self.slots, self.vocab_size, dtype=torch.bool, device=self.device)
        seen = self._seen[plan.first : plan.first + plan.rows]
        if plan.fresh:
            seen.zero_()
        start = self.config.start_token if plan.fresh else None  # a decoder behind an encoder does not write the prompt
        tokens = plan.tokens if start is None else torch.full((plan.rows, 1), start)
        return seen.scatter_(1, tokens.to(self.device), True)

    def _score(self, plan: Plan, stage: Stage, x: Tensor) -> Tensor:
        """Of each token but the first: its number, its log-probability given those before it, and the likeliest."""
        targets = plan.tokens[:, 1:].to(self.device)
        per_token = plan.rows * self.vocab_size * 4
        step = max(1, HEAD_BYTES // per_token)
        parts = [
            self._with_logprobs(
                targets[:, at : at + step], stage.logits(x[:, at : at + step][:, : targets.shape[1] - at]), plan.top
            )
            for at in range(0, targets.shape[1], step)
        ]
        return torch.cat(parts, 1) if parts else torch.empty(plan.answer_shape, dtype=torch.float64)

    def _with_logprobs(self, tokens: Tensor, logits: Tensor, top: int) -> Tensor:
        tensor = self.placement.tensor
        normalizer = log_normalizer(logits, tensor)
        columns = [tokens[..., None].double(), (logits_of(tokens, logits, tensor) - normalizer)[..., None].double()]
        if top > 0:
            values, numbers = likeliest(logits, top, tensor)
            columns += [numbers.double(), (values - normalizer[..., None]).double()]
        return torch.cat(columns, -1).cpu()

    def _receive(self, rows: int, positions: int, peer: int) -> Tensor:
        assert self._transport is not None
        stage = next(iter(self.placement.stages.values()))
        shape = (rows, positions, stage.config.hidden_size)
        x = torch.empty(shape, device=self.device, dtype=next(stage.parameters()).dtype)
        self._wait(self._transport.receive(x, peer, DATA, _nothing_came), peer)
        return x

    def _send(self, x: Tensor, peer: int) -> None:
        assert self._transport is not None
        x = x.contiguous()
        self._sent.append((self._transport.send(x, peer, DATA, _not_taken), peer, x))

    def _wait(self, work: Pending, peer: int) -> None:
        assert self._transport is not None
        self._transport.wait(work, peer, _nothing_came)


def _nothing_came() -> str:
    return "a stage's result was not handed on"


def _not_taken() -> str:
    return "a stage's result was not taken"
