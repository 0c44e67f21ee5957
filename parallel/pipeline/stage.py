"""One stage of a pipeline: a piece of the model, and how its forward, backward and weight gradients are run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from weft.parallel.deferred import WeightGradientQueue
from weft.parallel.pipeline.foreign import defer_linear
from weft.parallel.pipeline.payload import Nest, TensorSpec, as_arguments
from weft.parallel.pipeline.table import Value


@dataclass(frozen=True)
class WithSkips:
    """What a stage's module returns when its schedule has skips that begin there: the payload and, by name, the skips.

    `WithSkips(x, {"encoder": x})` under `schedule.with_skips(encoder=(0, 3))` calls the module of stage 3 with the
    keyword argument `encoder`, and brings the gradient back. A skip is a tensor or a nest, as a payload is.
    """

    payload: Nest
    skips: Mapping[str, Nest]


class PipelineStage:
    """Piece `index` of a model that is cut into stages.

    The module is called as `module(*payload, **keywords)`. The payload is what the stage before has returned (a tuple
    or list becomes several arguments) or, on the first stage, the microbatch; keywords are given by the caller of the
    step, on every rank for itself, and skips come as keywords too. It returns a tensor, None, or a nest of tuples,
    lists and dicts of tensors, or `WithSkips`.

    Args:
        module: the layers of this stage.
        index: its place in the pipeline, from 0.
        shared: parameters that other stages hold too, such as tied embeddings: a name that all of them use, and the
            parameter or its name in `module`. They are kept equal and their gradients are summed over all stages.
    """

    def __init__(
        self, module: nn.Module, index: int, *, shared: Mapping[str, nn.Parameter | str] | None = None
    ) -> None:
        self.module = module
        self.index = index
        self.shared = {
            key: module.get_parameter(parameter) if isinstance(parameter, str) else parameter
            for key, parameter in (shared or {}).items()
        }
        self._queue: WeightGradientQueue | None = None

    def defer_weight_gradients(self) -> bool:
        """Let weft's layers and plain `nn.Linear`s leave weight gradients for later; returns whether there are any.

        Called when a schedule splits this stage's backward: without a split, layers take their faster way.
        """
        self._queue = WeightGradientQueue()
        deferring = False
        for part in self.module.modules():
            if hasattr(part, "weight_gradient_queue"):
                part.weight_gradient_queue = self._queue  # type: ignore[assignment]
                deferring = True
            elif type(part) is nn.Linear:
                defer_linear(part, self._queue)
                deferring = True
        return deferring

    def compute_weight_gradients_at_once(self) -> None:
        """Let no layer leave its weight gradient for later, whatever the schedule."""
        self._queue = WeightGradientQueue()  # the one that plain linear layers look at never records again
        for part in self.module.modules():
            if hasattr(part, "weight_gradient_queue"):
                part.weight_gradient_queue = None  # type: ignore[assignment]

    def forward(self, payload: Nest, keywords: Mapping[str, Any]) -> Nest:
        return self.module(*as_arguments(payload), **keywords)

    def backward(self, saved: "Saved", gradients: Sequence[Tensor]) -> None:
        """Add the gradients of parameters and received inputs."""
        saved.backward(gradients)

    def backward_of_input(self, saved: "Saved", gradients: Sequence[Tensor]) -> Callable[[], None]:
        """Add the gradients of received inputs, and return the work that adds those of the weights.

        Parameters outside the layers that can defer have their gradients added at once.
        """
        assert self._queue is not None, "the stage was not told that its backward is split"
        with self._queue.record():
            saved.backward(gradients)
        return self._queue.take()


class Saved:
    """What must be kept of a forward until its backward: the received inputs, and the graph but not the outputs.

    Args:
        inputs: the tensors of each value that came from another stage.
        outputs: the loss, or the tensors handed on.
    """

    def __init__(self, inputs: Mapping[Value, Sequence[Tensor]], outputs: Sequence[Tensor]) -> None:
        self._inputs = {
            value: [tensor for tensor in tensors if tensor.requires_grad] for value, tensors in inputs.items()
        }
        self._edges: list[GradientEdge] = [get_gradient_edge(tensor) for tensor in outputs if tensor.requires_grad]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Backpropagate the gradients of those outputs that require them; frees the graph."""
        edges, self._edges = self._edges, []
        if edges:
            # What torch.autograd.backward calls, without its checks, which take longer than a small backward.
            Variable._execution_engine.run_backward(
                tuple(edges), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def input_gradients(self) -> dict[Value, list[Tensor]]:
        """By received value, the gradients of the tensors that require them; zeros where the stage does not use one."""
        return {
            value: [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]
            for value, tensors in self._inputs.items()
        }


def as_leaves(tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """The same tensors cut off from where they come from, ready to collect gradients."""
    return [tensor.detach().requires_grad_(spec.requires_grad) for tensor, spec in zip(tensors, specs, strict=True)]
