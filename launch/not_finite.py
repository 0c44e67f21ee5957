"""What to do about a step whose loss or gradient is not a finite number: find out where from, then go on or stop.

The optimiser has not moved yet. The same batch once more, with every module watched, tells a fault of the data or the
model, which comes again, from one of the hardware, which does not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.launch.engine import Engine, StepOutcome
from weft.launch.errors import FinalError
from weft.launch.sections import TrainSettings


@dataclass(frozen=True)
class Finding:
    """Where a rank first saw a number that is not finite.

    `module`: by its name in the stage. `parameter`: one of its own that is not finite, if any.
    """

    backward: bool
    microbatch: int
    stage: int
    rank: int
    module: str
    parameter: str | None = None

    @property
    def order(self) -> tuple[bool, int, int, bool, int]:
        """Sorts causes before their effects: numbers go forward through the stages, then back."""
        stage = -self.stage if self.backward else self.stage
        return (self.backward, self.microbatch, stage, self.parameter is None, self.rank)

    def __str__(self) -> str:
        kind = "gradient of" if self.backward else "output of"
        place = f"(stage {self.stage}, microbatch {self.microbatch})"
        words = f"first on rank {self.rank}, in the {kind} {self.module} {place}"
        return words + (f", whose {self.parameter} is not finite" if self.parameter else "")


class Guard:
    """Deals with steps that are not finite, as the settings say; every rank has one and does the same.

    Args:
        say: tells the user, on rank 0.
    """

    def __init__(self, engine: Engine, settings: TrainSettings, say: Callable[[str], None]) -> None:
        self._engine, self._settings, self._say = engine, settings, say

    def retry(self, outcome: StepOutcome, again: Callable[[], StepOutcome]) -> StepOutcome:
        """Go through the step `again` where that is wanted; returns the outcome that counts.

        A collective call, since all ranks see the same outcome.

        Raises:
            FinalError: it is not finite this time either, and the run is to stop.
        """
        what = f"step {outcome.step + 1}: the loss or the gradient is not finite"
        if not self._settings.replay_not_finite:
            return self._give_up(what, outcome)
        where = self._suspects(outcome)
        with _Watch(self._engine) as watch:
            second = again()
        if second.finite:
            self._say(f"{what}{where}; the same batch once more is finite: a fault of the hardware, not of the data")
            return second
        finding = _first(watch.finding)
        return self._give_up(
            f"{what}, {finding or 'seen in no module'}; the same batch once more gives the same", second
        )

    def _give_up(self, what: str, outcome: StepOutcome) -> StepOutcome:
        if self._settings.not_finite == "stop":
            raise FinalError(
                f"{what}: mend the data or the settings (a lower train.optimizer.learning_rate), or leave such steps "
                "out with train.not_finite=skip."
            )
        self._say(f"{what}: the step is left out")
        return outcome

    def _suspects(self, outcome: StepOutcome) -> str:
        """Which replica had the losses that are not finite, from the losses of all microbatches."""
        bad = [number for number, loss in enumerate(outcome.pipeline.losses.tolist()) if not math.isfinite(loss)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, bad)
        ranks = [rank for rank, theirs in enumerate(everyone) if theirs]
        if not ranks:
            return ""
        return f" (microbatch {everyone[ranks[0]][0]} of the replica of ranks {', '.join(map(str, ranks))})"


def _first(own: Finding | None) -> Finding | None:
    """The earliest of the findings of all ranks. A collective call."""
    everyone: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return min((finding for finding in everyone if finding), key=lambda finding: finding.order, default=None)


class _Watch:
    """Looks at what every module of this rank gives and gets back; `finding` is the first that is not finite."""

    def __init__(self, engine: Engine) -> None:
        self.finding: Finding | None = None
        self._engine = engine
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "_Watch":
        for stage in self._engine.stages:
            for name, module in stage.module.named_modules():
                hook = partial(self._forward, stage.index, name or "the stage")
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, stage: int, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward, stage, name))
        if not _all_finite(_tensors(output)) and _all_finite(_tensors(inputs)):
            own = (key for key, value in module.named_parameters(recurse=False) if not _all_finite([value]))
            self._note(Finding(False, self._microbatch(), stage, dist.get_rank(), name, next(own, None)))

    def _backward(self, stage: int, name: str, gradient: Tensor) -> None:
        if not _all_finite([gradient]):
            self._note(Finding(True, self._microbatch(), stage, dist.get_rank(), name))

    def _note(self, finding: Finding) -> None:
        if self.finding is None or (self.finding.backward and not finding.backward):
            self.finding = finding

    def _microbatch(self) -> int:
        return self._engine.record.read().microbatch or 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
