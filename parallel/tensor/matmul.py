"""The two matrix products of tensor parallelism, each with its communication, as one autograd function.

One function holds the product and the collectives around it, so that the backward can overlap them: the reduction of
the input's gradient travels while the weight gradients are computed, and under sequence parallelism the input is
gathered again (Korthikanti et al. 2022, §4.2.2) rather than kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.deferred import WeightGradientQueue, accumulate_gradient, gradient_dtype
from weft.parallel.exchange import start_all_gather, start_all_reduce, start_reduce_scatter
from weft.parallel.product import add_product, is_by_onednn, product

SEQUENCE_DIM = -2


def column_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    mesh: DeviceMesh,
    sequence_parallel: bool = False,
    queue: WeightGradientQueue | None = None,
    reduce_input_gradient: bool = True,
) -> tuple[Tensor, ...]:
    """`x W_i^T + b_i` for each weight, x whole (or gathered along the sequence), output features split.

    Column layers that read the same input are one call, so that their input gradients share one reduction. Without
    `reduce_input_gradient` the caller sums the input's gradient over the ranks (`Region`).

    Shapes: x `[…, sequence, in]` (`[…, sequence / tensor, in]` under sequence parallelism), weights `[out_i / tensor,
    in]`, results `[…, sequence, out_i / tensor]`.
    Communication: forward none (all-gather); backward all-reduce (all-gather and reduce-scatter).
    """
    communicates = mesh.size() > 1 and reduce_input_gradient
    if not communicates and queue is None and not any(is_by_onednn(x, weight) for weight in weights):
        return tuple(product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    x, *weights = in_autocast_precision(x, *weights)
    group, gather = (mesh, sequence_parallel) if communicates else (None, False)
    results = _ColumnMatmul.apply(x, group, gather, queue, len(weights), *weights, *biases)
    return tuple(results)


def row_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    mesh: DeviceMesh,
    sequence_parallel: bool = False,
    queue: WeightGradientQueue | None = None,
) -> Tensor:
    """`x W^T` summed over the ranks, input features split; without bias, which is added once after the sum.

    Shapes: x `[…, sequence, in / tensor]`, weight `[out, in / tensor]`, result `[…, sequence, out]`
    (`[…, sequence / tensor, out]` under sequence parallelism).
    Communication: forward all-reduce (reduce-scatter); backward none (all-gather).
    """
    if mesh.size() == 1 and queue is None and not is_by_onednn(x, weight):
        return product(x, weight)
    x, weight = in_autocast_precision(x, weight)
    result: Tensor = _RowMatmul.apply(x, weight, mesh, sequence_parallel and mesh.size() > 1, queue)
    return result


def in_autocast_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as `torch.autocast` would give them to a matrix product, so that the backward sees one precision."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class _ColumnMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mesh: DeviceMesh | None,
        gather: bool,
        queue: WeightGradientQueue | None,
        count: int,
        *weights_and_biases: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        whole = start_all_gather(x, mesh, SEQUENCE_DIM).wait() if gather and mesh is not None else x
        ctx.mesh, ctx.gather, ctx.queue = mesh, gather, queue
        # saved tensors come back as aliases under recompute; the queue accumulates into the parameters themselves
        ctx.parameters = weights
        ctx.save_for_backward(x, *weights)
        return tuple(product(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        count = len(weights)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        gathering = start_all_gather(x, ctx.mesh, SEQUENCE_DIM) if ctx.gather and any(needs[:count]) else None
        reducing = _reduce_input_gradient(ctx, gradients, weights) if needs_x else None
        whole = x if gathering is None else gathering.wait()
        weight_gradients = [
            _weight_gradient(ctx.queue, parameter, whole, gradient) if needed else None
            for parameter, gradient, needed in zip(ctx.parameters, gradients, needs[:count], strict=True)
        ]
        bias_gradients = [
            _rows(gradient).sum(0) if needed else None
            for gradient, needed in zip(gradients, needs[count:], strict=True)
        ]
        input_gradient = reducing() if reducing is not None else None
        return (input_gradient, None, None, None, None, *weight_gradients, *bias_gradients)


class _RowMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mesh: DeviceMesh, scatter: bool, queue: WeightGradientQueue | None
    ) -> Tensor:
        ctx.mesh, ctx.scatter, ctx.queue, ctx.parameter = mesh, scatter, queue, weight
        ctx.save_for_backward(x, weight)
        part = product(x, weight)
        if scatter:
            return start_reduce_scatter(part, mesh, SEQUENCE_DIM).wait()
        return part if mesh.size() == 1 else start_all_reduce(part, mesh, overwrite=True).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if ctx.scatter:
            gradient = start_all_gather(gradient, ctx.mesh, SEQUENCE_DIM).wait()
        input_gradient = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = _weight_gradient(ctx.queue, ctx.parameter, x, gradient)
        return input_gradient, weight_gradient, None, None, None


def _reduce_input_gradient(ctx: Any, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
    """Start the sum over the ranks of the input's gradient; the result waits for it."""
    total = product(gradients[0], weights[0].t())
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        add_product(_rows(total), _rows(gradient), weight)
    if ctx.mesh is None:
        return lambda: total
    if ctx.gather:
        return start_reduce_scatter(total, ctx.mesh, SEQUENCE_DIM).wait
    return start_all_reduce(total, ctx.mesh, overwrite=True).wait


def _weight_gradient(
    queue: WeightGradientQueue | None, parameter: Tensor, x: Tensor, gradient: Tensor
) -> Tensor | None:
    """`gradient^T x` over all tokens; put off when the queue records and the weight is a parameter."""
    if queue is not None and queue.recording and isinstance(parameter, nn.Parameter):
        queue.put(lambda: accumulate_gradient(parameter, outer_product(gradient, x, gradient_dtype(parameter))))
        return None
    return outer_product(gradient, x, gradient_dtype(parameter))


def outer_product(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient^T x` over all tokens, in `dtype`; on a GPU without rounding to the factors' precision in between."""
    left, right = _rows(gradient).t(), _rows(x)
    if dtype == torch.float32 and left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=dtype)
    return product(left, right.t()).to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
