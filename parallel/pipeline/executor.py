"""Runs a schedule: one executor for every table."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from time import perf_counter, time
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.pipeline.channels import open_channels
from weft.parallel.pipeline.check import check_schedule
from weft.parallel.pipeline.clock import clock_of
from weft.parallel.pipeline.feed import Feed, Given, make_feed
from weft.parallel.pipeline.losses import LossExchange
from weft.parallel.pipeline.payload import Nest, PayloadSpec, TensorSpec, take_apart
from weft.parallel.pipeline.plan import plan_rank
from weft.parallel.pipeline.run import LossFunction, ProgramRun
from weft.parallel.pipeline.schedules import forward_only
from weft.parallel.pipeline.shared import SharedParameters
from weft.parallel.pipeline.stage import PipelineStage
from weft.parallel.pipeline.table import Action, Schedule, lanes, traffic, uses
from weft.parallel.pipeline.timeline import Timeline
from weft.parallel.pipeline.transport import Shapes, Transport
from weft.parallel.records import RankRecord, open_record


@dataclass(frozen=True)
class StepResult:
    """What came of one pass through the pipeline.

    Attributes:
        loss: the step's loss, a float64 scalar on the CPU, the same on every rank of the pipeline.
        losses: the loss of each microbatch, `[microbatches]`, the same on every rank.
        metrics: what the loss function returned beside the loss, by name and of each microbatch, `[microbatches]`;
            float64 on the CPU, the same on every rank.
        read_timeline: gives `timeline`.
    """

    loss: Tensor
    losses: Tensor
    metrics: Mapping[str, Tensor]
    read_timeline: Callable[[], Timeline]

    @cached_property
    def timeline(self) -> Timeline:
        """The measured boxes of this rank, in seconds of `time.perf_counter`; on a GPU, waits for its work to end."""
        return self.read_timeline()


class PipelineExecutor:
    """Runs the programs of a schedule on the ranks of a pipeline.

    Making one is a collective call of the pipeline group, on GPUs of the whole world: the schedule is proved, and
    shared parameters get equal values. The modules' train or eval mode is the caller's.

    Args:
        schedule: the table to run.
        stages: the stages of this rank, as the schedule places them.
        mesh: the one-dimensional mesh of the pipeline axis.
        loss_function: `loss_function(output of the last stage, target)` gives one number, or that and a dict of
            further numbers, the same names for every microbatch.
        loss_reduction: "mean" weighs each microbatch by 1 / microbatches, "sum" adds the losses as they are.
        split: `split(batch, microbatches)` cuts a batch that is not given as a sequence of microbatches.
        shapes: "agree" lets headers tell the shapes of payloads once per step and stage, or per microbatch when the
            inputs differ in shape; "vary" sends a header with every activation, for outputs whose shapes depend on
            numbers; a mapping from stage to an example of its output (meta tensors will do) fixes them without any
            message.
        timeout: seconds that any wait for another rank may take.
        reduce_shared_gradients: sum the gradients of shared parameters at the end of each step. If not, the caller
            does it by calling `reduce_shared_gradients` once before the optimiser steps.
        before_last_backward: called with a stage's index just before the last action that produces its gradients, so
            that their reduction over other axes can begin while that action runs.
        after_backward: called with a stage's index after every action that may have added to its gradients.
        shared_stages: by the name of each shared parameter the stages that hold it, the same on every rank; None asks
            the other ranks.
        device: where the stages compute; the mesh's own device when None.
        record: where this rank notes what it does, for the message of the others when it hangs; by default a new one.

    Raises:
        ScheduleError: the schedule is not complete, not ordered, or can hang.
        ValueError: stages or mesh do not fit the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[PipelineStage],
        mesh: DeviceMesh,
        loss_function: LossFunction,
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        split: Callable[[Any, int], Sequence[Any]] | None = None,
        shapes: Literal["agree", "vary"] | Mapping[int, Nest] = "agree",
        timeout: float = 600.0,
        reduce_shared_gradients: bool = True,
        before_last_backward: Callable[[int], None] | None = None,
        after_backward: Callable[[int], None] | None = None,
        shared_stages: Mapping[str, Sequence[int]] | None = None,
        device: torch.device | None = None,
        record: RankRecord | None = None,
    ) -> None:
        check_schedule(schedule)
        device = device or _device(mesh)
        self.schedule = schedule
        self._stages = {stage.index: stage for stage in stages}
        self._loss_function = loss_function
        self._loss_reduction = loss_reduction
        self._split = split
        self._shapes = shapes
        self._reduces_shared = reduce_shared_gradients
        self._after_backward = after_backward
        self._check_stages(len(stages), mesh)
        self._clock = clock_of(device)
        record = record or open_record(os.environ)
        self._transport = Transport(open_channels(mesh, device, timeout), schedule, device, timeout, record)
        self._transport.channels.open(lanes(uses(schedule)))
        rank = self._transport.rank
        self._plan = plan_rank(schedule, rank, traffic(schedule, rank))
        self._forward_schedule = forward_only(schedule)
        self._forward_plan = plan_rank(self._forward_schedule, rank, traffic(self._forward_schedule, rank))
        self._last_backwards = self._find_last_backwards(before_last_backward)
        holders = None if shared_stages is None else _ranks_of(schedule, shared_stages)
        self._shared = SharedParameters(stages, self._transport, holders)

    def step(
        self, batch: Any = None, targets: Any = None, *, keywords: Sequence[Mapping[str, Any]] | None = None
    ) -> StepResult:
        """Forward and backward of one batch; gradients are added to `.grad` of this rank's parameters.

        Args:
            batch: a list or tuple with the input of each microbatch (a tensor, or a nest; a tuple is the first
                stage's arguments), or one tensor that is cut into equal parts along dim 0, or whatever `split`
                cuts. Only the rank of the first stage looks at it.
            targets: the same for the loss function's second argument, on the rank of the last stage.
            keywords: one dict of keyword arguments per microbatch, for the module of every stage of this rank.

        Raises:
            PipelineError: another rank did not do its part within the time limit.
            ValueError: batch, targets or keywords do not fit the schedule.
        """
        if self.schedule.forward_only:
            raise ValueError(f"schedule {self.schedule.name} has forwards only; call evaluate or forward")
        if self._reduces_shared:
            self._shared.begin_step()
        with torch.enable_grad():
            result = self._pass(Given(batch, targets, keywords), forward=False)
        if self._reduces_shared:
            self._shared.sum_gradients()
        return result

    def evaluate(
        self, batch: Any = None, targets: Any = None, *, keywords: Sequence[Mapping[str, Any]] | None = None
    ) -> StepResult:
        """The losses of one batch, as `step` takes it, without gradients."""
        with torch.no_grad():
            return self._pass(Given(batch, targets, keywords), forward=True)

    def forward(self, batch: Any = None, *, keywords: Sequence[Mapping[str, Any]] | None = None) -> list[Nest] | None:
        """The last stage's output of each microbatch, on the rank that holds that stage; None on the others."""
        with torch.no_grad():
            run = self._execute(self._make_feed(Given(batch, None, keywords), wants_loss=False), forward=True)
        return [run.outputs[microbatch] for microbatch in sorted(run.outputs)] if run.outputs else None

    def reduce_shared_gradients(self, gradients: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        """Sum the gradients of shared parameters over all stages that hold them, in place.

        `gradients`: by the shared name, those to sum instead of the parameters' own, one for each stage of this rank
        that holds the parameter; of one shape on all holders.
        """
        self._shared.sum_gradients(gradients)

    def gather_timeline(self, result: StepResult) -> Timeline:
        """The measured boxes of all ranks, on a common clock. A collective call of the pipeline group."""
        boxes = result.timeline.boxes
        programs = (self.schedule if len(boxes) == len(self._plan.actions) else self._forward_schedule).programs
        offset = time() - perf_counter()
        own = torch.zeros(2, max(map(len, programs)), dtype=torch.float64)
        own[0, : len(boxes)] = torch.tensor([box.start + offset for box in boxes], dtype=torch.float64)
        own[1, : len(boxes)] = torch.tensor([box.end + offset for box in boxes], dtype=torch.float64)
        everyone = [torch.zeros_like(own) for _ in programs]
        dist.all_gather(everyone, own, group=self._transport.group)
        times = [theirs[:, : len(program)].tolist() for theirs, program in zip(everyone, programs, strict=True)]
        return Timeline(programs, [starts for starts, _ in times], [ends for _, ends in times])

    def _timeline(self, program: list[Action], starts: list[Any], ends: list[Any]) -> Timeline:
        def placed(own: list[Any]) -> list[list[Any]]:
            return [own if rank == self._transport.rank else [] for rank in range(self.schedule.ranks)]

        times = self._clock.read([*starts, *ends])
        return Timeline(placed(program), placed(times[: len(starts)]), placed(times[len(starts) :]))

    def _pass(self, given: Given, *, forward: bool) -> StepResult:
        feed = self._make_feed(given, wants_loss=True)
        exchange = LossExchange(self._transport, self.schedule)
        run = self._execute(feed, forward=forward)
        losses, metrics = exchange.finish(run.losses, run.metrics)
        read_timeline = partial(self._timeline, run.program, run.starts, run.ends)
        return StepResult(losses.sum() * self._loss_weight, losses, metrics, read_timeline)

    def _make_feed(self, given: Given, *, wants_loss: bool) -> Feed:
        feed = make_feed(self.schedule, given, split=self._split, rank=self._transport.rank, wants_loss=wants_loss)
        return replace(feed, uniform=False) if self._shapes == "vary" else feed

    def _execute(self, feed: Feed, *, forward: bool) -> ProgramRun:
        run = ProgramRun(
            self._forward_schedule if forward else self.schedule,
            self._forward_plan if forward else self._plan,
            self._stages,
            self._transport,
            Shapes(_fixed_specs(self._shapes, requires_grad=not forward), self.schedule.skips),
            feed,
            self._clock,
            loss_function=self._loss_function,
            loss_weight=self._loss_weight,
            before_last_backward={} if forward else self._last_backwards,
            after_backward=None if forward else self._after_backward,
        )
        run.execute()
        return run

    @property
    def _loss_weight(self) -> float:
        return 1.0 / self.schedule.microbatches if self._loss_reduction == "mean" else 1.0

    def _check_stages(self, count: int, mesh: DeviceMesh) -> None:
        size, rank = mesh.size(), mesh.get_local_rank()
        if size != self.schedule.ranks:
            raise ValueError(
                f"schedule {self.schedule.name} is for {self.schedule.ranks} ranks, but the pipeline axis has {size}; "
                "build it for that number"
            )
        wanted = self.schedule.stages_of(rank)
        if sorted(self._stages) != wanted or count != len(wanted):
            raise ValueError(
                f"rank {rank} of the pipeline was given stages {sorted(self._stages)}, but schedule "
                f"{self.schedule.name} places {wanted} on it"
            )

    def _find_last_backwards(self, callback: Callable[[int], None] | None) -> dict[Action, Callable[[], None]]:
        """The last action that produces gradients of each stage; a W does so only where layers can defer."""
        split = {planned.action.stage for planned in self._plan.actions if planned.action.kind == "W"}
        deferring = {index for index in split if self._stages[index].defer_weight_gradients()}
        last: dict[int, Action] = {}
        for planned in self._plan.actions:
            action = planned.action
            if action.kind in ("BW" if action.stage in deferring else "BI"):
                last[action.stage] = action
        return {action: partial(callback, stage) for stage, action in last.items()} if callback else {}


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _ranks_of(schedule: Schedule, shared_stages: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {key: sorted({schedule.placement[stage] for stage in stages}) for key, stages in shared_stages.items()}


def _fixed_specs(shapes: str | Mapping[int, Nest], *, requires_grad: bool) -> dict[int, PayloadSpec]:
    if isinstance(shapes, str):
        return {}
    specs = {}
    for stage, example in shapes.items():
        tensors, spec = take_apart(example)
        of = (TensorSpec(t.dtype, tuple(t.shape), requires_grad and t.is_floating_point()) for t in tensors)
        specs[stage] = PayloadSpec(spec.structure, tuple(of))
    return specs
