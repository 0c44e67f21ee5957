"""One pass of one rank through its program: the loop that every schedule runs through."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from weft.parallel.blame import blame, timed_out
from weft.parallel.pipeline.clock import Clock
from weft.parallel.pipeline.feed import Feed
from weft.parallel.pipeline.payload import Nest, PayloadSpec, put_together, take_apart
from weft.parallel.pipeline.plan import Planned, RankPlan
from weft.parallel.pipeline.stage import PipelineStage, Saved, WithSkips, as_leaves
from weft.parallel.pipeline.table import KINDS, Action, Schedule, Value
from weft.parallel.pipeline.transport import Inbox, Outbox, PipelineError, Shapes, Transport

LossFunction = Callable[[Any, Any], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
Taken = dict[Value, list[Tensor]]
Given = tuple[Value, list[Tensor], bytes | None]


class ProgramRun:
    """Runs the program of one rank once.

    `losses`, `metrics` and `outputs` hold what came of it, `starts` and `ends` the marks of `clock` around each action.
    """

    def __init__(
        self,
        schedule: Schedule,
        plan: RankPlan,
        stages: Mapping[int, PipelineStage],
        transport: Transport,
        shapes: Shapes,
        feed: Feed,
        clock: Clock,
        *,
        loss_function: LossFunction | None,
        loss_weight: float,
        before_last_backward: Mapping[Action, Callable[[], None]],
        after_backward: Callable[[int], None] | None = None,
    ) -> None:
        self.losses: dict[int, Tensor] = {}
        self.metrics: dict[int, Mapping[str, Tensor]] = {}
        self.outputs: dict[int, Nest] = {}
        self.starts: list[Any] = []
        self.ends: list[Any] = []
        self._schedule = schedule
        self._plan = plan
        self._stages = stages
        self._where = transport.here
        self._record = transport.record
        self._shapes = shapes
        self._feed = feed
        self._clock = clock
        self._loss_function = loss_function
        self._loss_weight = loss_weight
        self._before_last_backward = before_last_backward
        self._after_backward = after_backward
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
        self._post(self._plan.first)
        for planned in self._plan.actions:
            self._perform(planned)
        for outbox in self._outboxes.values():
            outbox.drain()

    def _perform(self, planned: Planned) -> None:
        action = planned.action
        self._record.enter(KINDS[action.kind], action.stage, action.microbatch)
        taken = self._take(planned)
        self._post(planned.post)
        if action in self._before_last_backward:
            self._before_last_backward[action]()
        self.starts.append(self._clock.mark())
        try:
            given = self._compute[action.kind](action, taken)
            if self._after_backward is not None and action.kind != "F":
                self._after_backward(action.stage)
        except Exception as error:
            where = f"in the {KINDS[action.kind]} of microbatch {action.microbatch} on stage {action.stage}"
            if timed_out(error):
                raise PipelineError(
                    f"{self._where()}: {where} other ranks did not take part in time{blame(self._record)}"
                ) from error
            error.add_note(f"{self._where()}: {where} (action {action} of schedule {self._schedule.name})")
            raise
        self.ends.append(self._clock.mark())
        for value, tensors, header in given:
            self._hand_on(planned, value, tensors, header)

    def _post(self, receives: Iterable[tuple[int, int]]) -> None:
        for peer, count in receives:
            self._inboxes[peer].post(count)

    def _take(self, planned: Planned) -> Taken:
        taken = {
            value: self._handed_over.pop(value) if source is None else self._inboxes[source].take(value)
            for value, source in planned.takes
        }
        for peer, count in planned.release:
            self._outboxes[peer].release(count)
        return taken

    def _hand_on(self, planned: Planned, value: Value, tensors: list[Tensor], header: bytes | None) -> None:
        peers = [peer for sent, peer in planned.destinations if sent == value]
        if not peers:
            self._handed_over[value] = tensors
        for peer in peers:
            self._outboxes[peer].put(value, tensors, header)

    def _forward(self, action: Action, taken: Taken) -> list[Given]:
        _, index, microbatch = action
        leaves = {value: as_leaves(tensors, self._spec(value).tensors) for value, tensors in taken.items()}
        nests = {value.name: put_together(self._spec(value).structure, leaves[value]) for value in leaves}
        if index == 0:
            assert self._feed.inputs is not None
            nests["act"] = self._feed.inputs[microbatch]
        payload = nests.pop("act")
        output = self._stages[index].forward(payload, {**self._feed.keywords[microbatch], **nests})
        handed_on = self._handed_on(index, output)
        if index == self._schedule.stages - 1:
            self._finish(microbatch, leaves, output)
            return []
        apart = {Value(name, index, microbatch): take_apart(nest) for name, nest in handed_on.items()}
        if torch.is_grad_enabled():
            outputs = [tensor for tensors, _ in apart.values() for tensor in tensors]
            self._saved[index, microbatch] = Saved(leaves, outputs)
        uniform = self._feed.uniform and all(map(self._shapes.uniform, taken))
        return [(value, tensors, self._announce(value, spec, uniform)) for value, (tensors, spec) in apart.items()]

    def _spec(self, value: Value) -> PayloadSpec:
        spec = self._shapes.of(value)
        assert spec is not None
        return spec

    def _handed_on(self, index: int, output: Nest | WithSkips) -> dict[str, Nest]:
        """What the module of a stage has returned, by the names of the values, in the order of the table."""
        wanted = [name for name, (source, _) in self._schedule.skips.items() if source == index]
        payload, skips = (output.payload, output.skips) if isinstance(output, WithSkips) else (output, {})
        if set(skips) != set(wanted):
            raise ValueError(
                f"stage {index} returned the skips {sorted(skips)}, but the schedule has {sorted(wanted)} begin there; "
                "return WithSkips(payload, skips) with these"
            )
        return {"act": payload, **{name: skips[name] for name in wanted}}

    def _finish(self, microbatch: int, leaves: Taken, output: Nest) -> None:
        """Keep the last stage's output, or its loss when there are targets."""
        if self._loss_function is None or self._feed.targets is None:
            self.outputs[microbatch] = output
            return
        found = self._loss_function(output, self._feed.targets[microbatch])
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"the loss function returned {what}; it must return a tensor of one number")
        for name, metric in metrics.items():
            if not isinstance(metric, Tensor) or metric.numel() != 1:
                raise ValueError(f"the loss function returned a metric {name} that is not a tensor of one number")
        self.metrics[microbatch] = {name: metric.detach() for name, metric in metrics.items()}
        self.losses[microbatch] = loss.detach()
        if torch.is_grad_enabled():
            self._saved[self._schedule.stages - 1, microbatch] = Saved(leaves, [loss])

    def _announce(self, value: Value, spec: PayloadSpec, uniform: bool) -> bytes | None:
        """Make the shapes of a value known on this rank; return the header that tells the receiver, if any."""
        known = self._shapes.of(value)
        if known is None:
            self._shapes.announce(value, spec, uniform=uniform)
            self._post((peer, 0) for peer in self._inboxes)  # gradients have the shapes of what they belong to
            return spec.encode(uniform=uniform)
        if known != spec:
            raise ValueError(
                f"stage {value.stage} hands on {spec.describe()} for microbatch {value.microbatch}, where "
                f"{known.describe()} was announced; give the executor shapes='vary' when outputs differ though inputs "
                "look alike"
            )
        return None

    def _backward(self, action: Action, taken: Taken) -> list[Given]:
        saved = self._saved.pop((action.stage, action.microbatch))
        self._stages[action.stage].backward(saved, self._output_gradients(action, taken))
        return self._input_gradients(action, saved)

    def _backward_of_input(self, action: Action, taken: Taken) -> list[Given]:
        _, index, microbatch = action
        saved = self._saved.pop((index, microbatch))
        gradients = self._output_gradients(action, taken)
        self._weight_work[index, microbatch] = self._stages[index].backward_of_input(saved, gradients)
        return self._input_gradients(action, saved)

    def _of_weight(self, action: Action, taken: Taken) -> list[Given]:
        self._weight_work.pop((action.stage, action.microbatch))()
        return []

    def _output_gradients(self, action: Action, taken: Taken) -> list[Tensor]:
        if action.stage < self._schedule.stages - 1:
            return [tensor for tensors in taken.values() for tensor in tensors]
        return [torch.full_like(self.losses[action.microbatch], self._loss_weight)]

    def _input_gradients(self, action: Action, saved: Saved) -> list[Given]:
        gradients = saved.input_gradients()
        return [(value.gradient(action.stage), tensors, None) for value, tensors in gradients.items()]
