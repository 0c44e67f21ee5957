"""Lets the `nn.Linear` layers of models that others wrote leave their weight gradients for later."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.parallel.deferred import WeightGradientQueue, accumulate_gradient
from weft.parallel.product import add_product, is_by_onednn, product


def defer_linear(layer: nn.Linear, queue: WeightGradientQueue) -> None:
    """From now on `layer` puts its weight gradients into `queue` while that records; its results stay the same."""
    layer.forward = partial(_forward, layer, queue)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, queue: WeightGradientQueue, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if _can_watch(weight, x):
        return _watched(weight, bias, queue, x)
    result: Tensor = _Linear.apply(x, weight, bias, layer, queue)
    return result


def _can_watch(weight: Tensor, x: Tensor) -> bool:
    """Whether torch's own layer will do: where `x` has no gradient, nobody would hear of the result's.

    And what watches it holds `x`, which those who hook saved tensors, to compute them anew or to store them elsewhere,
    want freed.
    """
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.compiler.is_compiling()
        and not is_by_onednn(x, weight)
    )


def _watched(weight: Tensor, bias: Tensor | None, queue: WeightGradientQueue, x: Tensor) -> Tensor:
    """torch's layer with weights that autograd takes for constants; half as dear as a function of one's own."""
    version = x._version
    result = F.linear(x, weight.detach(), None if bias is None else bias.detach())

    def watch(gradients: tuple[Tensor, ...]) -> None:
        if x._version != version:
            raise RuntimeError("the input of a linear layer was changed in place before its backward; copy it first")
        if queue.recording:
            queue.put(partial(_add_gradients, weight, bias, gradients[0], x))
        else:
            _add_gradients(weight, bias, gradients[0], x)

    assert result.grad_fn is not None, "x requires a gradient"
    result.grad_fn.register_prehook(watch)
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
        # The saved weight may be a stand-in made by activation checkpointing: the parameter is the layer's.
        queue.put(partial(_add_gradients, layer.weight, layer.bias, gradient, x))
        return input_gradient, None, None, None, None


def _add_gradients(weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor) -> None:
    """Those of parameters that want one."""
    gradient = _rows(gradient)
    if weight.requires_grad:
        _accumulate_weight(weight, gradient, _rows(x))
    if bias is not None and bias.requires_grad:
        accumulate_gradient(bias, gradient.sum(0))


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _weight_gradient(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return product(_rows(gradient).t(), _rows(x).to(gradient.dtype).t()).to(dtype)


def _accumulate_weight(weight: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add the product of rows to the gradient in one pass over it, where the precisions agree."""
    if weight.grad is not None and weight.grad.dtype == gradient.dtype == x.dtype:
        add_product(weight.grad, gradient.t(), x)
    else:
        accumulate_gradient(weight, _weight_gradient(gradient, x, weight.dtype))
