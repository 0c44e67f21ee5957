"""One pass of one rank through its program: the loop that every schedule runs through."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from weft.parallel.pipeline.feed import Feed
from weft.parallel.pipeline.payload import Nest, PayloadSpec, put_together, take_apart
from weft.parallel.pipeline.plan import Planned, RankPlan
from weft.parallel.pipeline.stage import PipelineStage, Saved, as_leaves
from weft.parallel.pipeline.table import KINDS, Action, Schedule, Value
from weft.parallel.pipeline.transport import Inbox, Outbox, Shapes, Transport

LossFunction = Callable[[Any, Any], Tensor]


class ProgramRun:
    """Runs the program of one rank once; afterwards `losses`, `outputs`, `starts` and `ends` hold what came of it."""

    def __init__(
        self,
        schedule: Schedule,
        plan: RankPlan,
        stages: Mapping[int, PipelineStage],
        transport: Transport,
        shapes: Shapes,
        feed: Feed,
        *,
        loss_function: LossFunction | None,
        loss_weight: float,
        before_last_backward: Mapping[Action, Callable[[], None]],
    ) -> None:
        self.losses: dict[int, Tensor] = {}
        self.outputs: dict[int, Nest] = {}
        self.starts: list[float] = []
        self.ends: list[float] = []
        self._schedule = schedule
        self._plan = plan
        self._stages = stages
        self._where = transport.here
        self._shapes = shapes
        self._feed = feed
        self._loss_function = loss_function
        self._loss_weight = loss_weight
        self._before_last_backward = before_last_backward
        self._inboxes = {peer: Inbox(transport, peer, order, shapes) for peer, order in plan.incoming.items()}
        self._outboxes = {peer: Outbox(transport, peer) for peer in plan.outgoing}
        self._compute = {"F": self._forward, "B": self._backward, "I": self._backward_of_input, "W": self._of_weight}
        self._handed_over: dict[Value, list[Tensor]] = {}
        self._saved: dict[tuple[int, int], Saved] = {}
        self._weight_work: dict[tuple[int, int], Callable[[], None]] = {}

    @property
    def program(self) -> list[Action]:
        return [planned.action for planned in self._plan.actions]

    def execute(self) -> None:
        """Run all actions, then wait until everything sent has been taken."""
        for planned in self._plan.actions:
            self._perform(planned)
        for outbox in self._outboxes.values():
            outbox.drain()

    def _perform(self, planned: Planned) -> None:
        action = planned.action
        for peer, count in planned.post:
            self._inboxes[peer].post(count)
        tensors = self._take(planned)
        if action in self._before_last_backward:
            self._before_last_backward[action]()
        self.starts.append(perf_counter())
        try:
            given = self._compute[action.kind](action, tensors)
        except Exception as error:
            error.add_note(
                f"{self._where()}: in the {KINDS[action.kind]} of microbatch {action.microbatch} on stage "
                f"{action.stage} (action {action} of schedule {self._schedule.name})"
            )
            raise
        self.ends.append(perf_counter())
        if given is not None:
            self._hand_on(planned, *given)

    def _take(self, planned: Planned) -> list[Tensor]:
        if planned.takes is None:
            return []
        if planned.source is None:
            return self._handed_over.pop(planned.takes)
        tensors = self._inboxes[planned.source].take(planned.takes)
        for peer, count in planned.release:
            self._outboxes[peer].release(count)
        return tensors

    def _hand_on(self, planned: Planned, value: Value, tensors: list[Tensor], header: bytes | None) -> None:
        if not planned.destinations:
            self._handed_over[value] = tensors
        for peer in planned.destinations:
            self._outboxes[peer].put(value, tensors, header)

    def _forward(self, action: Action, tensors: list[Tensor]) -> tuple[Value, list[Tensor], bytes | None] | None:
        _, index, microbatch = action
        payload, leaves = self._payload(index, microbatch, tensors)
        output = self._stages[index].forward(payload, self._feed.keywords[microbatch])
        if index == self._schedule.stages - 1:
            self._finish(microbatch, leaves, output)
            return None
        outputs, spec = take_apart(output)
        if torch.is_grad_enabled():
            self._saved[index, microbatch] = Saved(leaves, outputs)
        return Value("act", index, microbatch), outputs, self._announce(index, microbatch, spec)

    def _payload(self, index: int, microbatch: int, tensors: list[Tensor]) -> tuple[Nest, list[Tensor]]:
        if index == 0:
            assert self._feed.inputs is not None
            return self._feed.inputs[microbatch], []
        spec = self._shapes.of(index - 1, microbatch)
        assert spec is not None
        leaves = as_leaves(tensors, spec.tensors)
        return put_together(spec.structure, leaves), leaves

    def _finish(self, microbatch: int, leaves: list[Tensor], output: Nest) -> None:
        """Keep the last stage's output, or its loss when there are targets."""
        if self._loss_function is None or self._feed.targets is None:
            self.outputs[microbatch] = output
            return
        loss = self._loss_function(output, self._feed.targets[microbatch])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"the loss function returned {what}; it must return a tensor of one number")
        self.losses[microbatch] = loss.detach()
        if torch.is_grad_enabled():
            self._saved[self._schedule.stages - 1, microbatch] = Saved(leaves, [loss])

    def _announce(self, index: int, microbatch: int, spec: PayloadSpec) -> bytes | None:
        """Make the shapes of a stage's output known on this rank; return the header that tells the receiver, if any."""
        known = self._shapes.of(index, microbatch)
        if known is None:
            uniform = self._feed.uniform and (index == 0 or self._shapes.uniform(index - 1))
            self._shapes.announce(index, microbatch, spec, uniform=uniform)
            return spec.encode(uniform=uniform)
        if known != spec:
            raise ValueError(
                f"stage {index} hands on {spec.describe()} for microbatch {microbatch}, where {known.describe()} was "
                "announced; give the executor shapes='vary' when outputs differ though inputs look alike"
            )
        return None

    def _backward(self, action: Action, tensors: list[Tensor]) -> tuple[Value, list[Tensor], None] | None:
        saved = self._saved.pop((action.stage, action.microbatch))
        self._stages[action.stage].backward(saved, self._output_gradients(action, tensors))
        return self._input_gradients(action, saved)

    def _backward_of_input(self, action: Action, tensors: list[Tensor]) -> tuple[Value, list[Tensor], None] | None:
        _, index, microbatch = action
        saved = self._saved.pop((index, microbatch))
        gradients = self._output_gradients(action, tensors)
        self._weight_work[index, microbatch] = self._stages[index].backward_of_input(saved, gradients)
        return self._input_gradients(action, saved)

    def _of_weight(self, action: Action, tensors: list[Tensor]) -> None:
        self._weight_work.pop((action.stage, action.microbatch))()

    def _output_gradients(self, action: Action, tensors: list[Tensor]) -> list[Tensor]:
        if action.stage < self._schedule.stages - 1:
            return tensors
        return [torch.full_like(self.losses[action.microbatch], self._loss_weight)]

    def _input_gradients(self, action: Action, saved: Saved) -> tuple[Value, list[Tensor], None] | None:
        if action.stage == 0:
            return None
        return Value("grad", action.stage, action.microbatch), saved.input_gradients(), None
