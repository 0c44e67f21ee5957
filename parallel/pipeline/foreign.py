"""Lets the `nn.Linear` layers of models that others wrote leave their weight gradients for later."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.parallel.deferred import WeightGradientQueue, accumulate_gradient
from weft.parallel.product import add_product, product


def defer_linear(layer: nn.Linear, queue: WeightGradientQueue) -> None:
    """From now on `layer` puts its weight gradients into `queue` while that records; its results stay the same."""
    layer.forward = partial(_forward, layer, queue)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, queue: WeightGradientQueue, x: Tensor) -> Tensor:
    result: Tensor = _Linear.apply(x, layer.weight, layer.bias, layer, queue)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear, queue: WeightGradientQueue
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.queue = layer, queue
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        layer, queue = ctx.layer, ctx.queue
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        input_gradient = product(gradient, weight.to(gradient.dtype).t()) if needs_input else None
        if not queue.recording:
            weight_gradient = _weight_gradient(gradient, x, weight.dtype) if needs_weight else None
            return input_gradient, weight_gradient, _rows(gradient).sum(0) if needs_bias else None, None, None

        def work() -> None:
            # The saved weight may be a stand-in made by activation checkpointing: the parameter is the layer's.
            if needs_weight:
                _accumulate_weight(layer.weight, gradient, x)
            if needs_bias:
                accumulate_gradient(layer.bias, _rows(gradient).sum(0).to(layer.bias.dtype))

        queue.put(work)
        return input_gradient, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _weight_gradient(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return product(_rows(gradient).t(), _rows(x).to(gradient.dtype).t()).to(dtype)


def _accumulate_weight(weight: nn.Parameter, gradient: Tensor, x: Tensor) -> None:
    """Add the product to the gradient in one pass over it, where the precisions agree."""
    if weight.grad is not None and weight.grad.dtype == gradient.dtype == x.dtype:
        add_product(weight.grad, _rows(gradient).t(), _rows(x).t())
    else:
        accumulate_gradient(weight, _weight_gradient(gradient, x, weight.dtype))
