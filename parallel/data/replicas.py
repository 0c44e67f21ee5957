"""Replicas: how the ranks of the data axis share gradients, the weights that are updated, and the optimiser's states.

All ways of sharing answer the same questions, so that gradient norm, clipping, checkpoints and averages of the weights
are written once: which piece of which parameter does this rank update, and what is its gradient?
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.data.buckets import GradientBuckets
from weft.parallel.pipeline.stage import PipelineStage
from weft.parallel.sharding import Sharding, sharded_parameters

ParameterGroup = dict[str, Any]
MakeOptimizer = Callable[[list[ParameterGroup]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank updates: a range of its elements in memory order.

    Attributes:
        name: of the parameter, the same in every layout; a parameter that stages share goes by the name they share.
        stage: the stage that holds it.
        parameter: what the model computes with, a shard of the tensor axis or the whole.
        sharding: how the parameter is split over the tensor axis; None: replicated.
        weight: the elements that are updated, float32 at least; of any shape.
        start: the place of the first of them in the flattened parameter.
        shared: whether stages share the parameter.
        copied: whether another of them counts it in sums and saves it.
    """

    name: str
    stage: int
    parameter: nn.Parameter
    sharding: Sharding | None
    weight: Tensor
    start: int = 0
    shared: bool = False
    copied: bool = False


class Replicas(ABC):
    """The stages of one rank in training, as one of the replicas along the data axis.

    Per optimiser step: `begin`, the backward passes, `finish`, then `step` or `skip`. Between `finish` and these,
    `gradient(piece)` is summed over the data axis, in place to be summed over other axes and clipped. Gradients are
    summed, not averaged: the loss is already divided by what the whole batch counts.

    Attributes:
        pieces: what this rank updates.
        optimizer: updates them; its groups are those given, in order, and may be given another learning rate.
        split_over: the axes over which the pieces of one parameter are spread, beside the tensor axis.
    """

    pieces: list[Piece]
    optimizer: torch.optim.Optimizer
    split_over: Sequence[DeviceMesh] = ()

    @abstractmethod
    def begin(self) -> None:
        """Set all gradients to zero."""

    def before_last_backward(self, stage: int) -> None:  # noqa: B027, since few need to know
        """The next action is the last that adds to gradients of the stage."""

    def after_backward(self, stage: int) -> None:  # noqa: B027
        """An action that added to gradients of the stage has ended."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all gradients are summed over the data axis."""

    @abstractmethod
    def gradient(self, piece: Piece) -> Tensor:
        """The gradient of the piece, in the shape of its weight."""

    @abstractmethod
    def step(self) -> None:
        """Update the pieces, and the parameters of all replicas with them."""

    def skip(self) -> None:
        """Leave weights and optimiser as they are and forget the gradients."""
        self.begin()

    @abstractmethod
    def refresh(self) -> None:
        """Give the parameters of all replicas the values of the pieces, after these were changed."""

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """The shape of the parameter that the piece is a part of, not divided over the data axis."""
        return tuple(piece.parameter.shape)

    @abstractmethod
    def states(self, piece: Piece) -> dict[str, Tensor]:
        """The optimiser's states of the piece by their names; none before a step.

        They have the shape of the weight, unless the optimiser needs whole matrices.
        """

    @property
    @abstractmethod
    def gradient_bytes(self) -> int:
        """What the gradients take that this rank holds when the backward passes of a step are done."""

    def stored_weights(self) -> list[Tensor]:
        """Tensors of the weights that the model computes with, where they are other than its parameters."""
        return []

    def whole_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The weights that a module of one of the stages computes with, by name. A collective call of the data axis."""
        return module.state_dict()

    @property
    def optimizer_steps(self) -> int:
        """How often the optimiser has updated weights."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

    def make_states(self, steps: int) -> None:
        """Make the optimiser's states as they are after so many steps, to be filled from a checkpoint."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            for weight in group["params"]:
                weight.grad = None
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)


class PlainReplicas(Replicas):
    """Every rank updates all parameters of its stages alike (ZeRO 0).

    Parameters of less than float32 get float32 master weights and float32 gradients (Micikevicius et al. 2018, §3.1).

    Communication: one all-reduce per bucket of gradients, during the last backward of each stage.
    """

    def __init__(
        self,
        stages: Iterable[PipelineStage],
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        mesh: DeviceMesh,
    ) -> None:
        stages = list(stages)
        masters = {
            parameter: _master(parameter)
            for group in groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        for parameter in masters:
            collect_in_float32(parameter)
        self.buckets = {
            stage.index: GradientBuckets(stage.module.parameters(), mesh, late=stage.shared.values())
            for stage in stages
        }
        self.pieces = [
            Piece(name, stage, parameter, sharding, masters[parameter], shared=shared, copied=copied)
            for name, stage, parameter, sharding, shared, copied in named_parameters(stages)
        ]
        self._copies = [(p, master) for p, master in masters.items() if master is not p]
        self.optimizer = make_optimizer([group | {"params": [masters[p] for p in group["params"]]} for group in groups])

    def begin(self) -> None:
        for buckets in self.buckets.values():
            buckets.zero()

    @property
    def gradient_bytes(self) -> int:
        return sum(buckets.bytes for buckets in self.buckets.values())

    def before_last_backward(self, stage: int) -> None:
        self.buckets[stage].arm()

    def finish(self) -> None:
        for buckets in self.buckets.values():
            buckets.finish()

    def gradient(self, piece: Piece) -> Tensor:
        assert piece.parameter.grad is not None
        return piece.parameter.grad

    def step(self) -> None:
        for parameter, master in self._copies:
            master.grad = parameter.grad
        self.optimizer.step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_([parameter for parameter, _ in self._copies], [master for _, master in self._copies])

    def states(self, piece: Piece) -> dict[str, Tensor]:
        return tensor_states(self.optimizer, piece.weight)


class Named(NamedTuple):
    """A trained parameter of a stage, and what a `Piece` says of it."""

    name: str
    stage: int
    parameter: nn.Parameter
    sharding: Sharding | None
    shared: bool
    copied: bool


def named_parameters(stages: Iterable[PipelineStage]) -> list[Named]:
    """The trained parameters of some stages.

    Of the parameters that stages share, those that the module names in its `copies` are counted by another stage;
    without that attribute, all of every stage but the first.
    """
    found = []
    for stage in stages:
        keys = {id(parameter): key for key, parameter in stage.shared.items()}
        for name, parameter, sharding in sharded_parameters(stage.module):
            if parameter.requires_grad:
                key = keys.get(id(parameter))
                copies = getattr(stage.module, "copies", keys.values() if stage.index else ())
                found.append(Named(key or name, stage.index, parameter, sharding, key is not None, key in copies))
    return found


def collect_in_float32(parameter: nn.Parameter) -> None:
    """Let the parameter sum its microbatches' gradients in float32 where its own precision is less."""
    parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)


def tensor_states(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The states that the optimiser keeps for a weight, beside the count of steps."""
    state: Mapping[str, Any] = optimizer.state[weight]
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    precision = torch.promote_types(parameter.dtype, torch.float32)
    if precision == parameter.dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(precision))
