"""What can be verified: a model that can be built on any mesh and trained there, step by step."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.verify.layout import Layout, Plan
from weft.parallel.sharding import Sharding


class UnfitError(Exception):
    """The model cannot be built in a layout, for the reason that the message gives."""


class Run(Protocol):
    """One rank's part of a model in training."""

    @property
    def own_loss(self) -> float | None:
        """This rank's loss of the last step before it was averaged over data ranks, where that is done."""

    @property
    def targets(self) -> tuple[int, ...]:
        """For each integer tensor of this rank's batch, how many of its entries are not negative."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules by their names in the plain model that take and give what they do there."""

    def parameters(self) -> Iterator[tuple[str, Tensor, Sharding | None]]:
        """The parameters by their global names; where data ranks divide them, put together from all. A collective call
        of the data axis."""

    def replace_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these values of the parameters that they name, in the shapes that `parameters` gives."""

    def output(self) -> Tensor | None:
        """What the model makes of this rank's rows of the first batch; None on ranks that do not hold its end."""

    def step(self, number: int) -> tuple[float, float]:
        """Train one step, numbered from 0; loss and gradient norm."""

    def gradients(self) -> dict[str, Tensor]:
        """The last step's gradients of what `parameters` gives, before clipping. A collective call of the data axis."""


class Subject(Protocol):
    """A model to verify; picklable.

    Attributes:
        name: for the report's title.
        steps: optimiser steps of each run.
        output_name: what the model's output is called.
    """

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def output_name(self) -> str: ...

    def plan(self, processes: int) -> Plan:
        """The layouts that fit, and those that do not."""

    def build(self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, *, microbatches: int | None = None) -> Run:
        """This rank's part of a freshly initialised model.

        Raises:
            UnfitError: the model says that its sizes do not fit the layout.
        """
