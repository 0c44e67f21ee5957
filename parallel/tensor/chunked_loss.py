"""The output layer and its cross-entropy in one, some tokens at a time: all logits never exist at once.

A vocabulary of 128,000 makes 0.5 MB of float32 logits per token, and the plain way holds them about three times. Here a
chunk of tokens goes through logits, loss and gradients before the next one; what stays are the gradients of input and
weight (Wijmans et al. 2024 and Hsu et al. 2024 do the same inside one GPU kernel).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.collectives import all_gather, copy
from weft.parallel.deferred import gradient_dtype
from weft.parallel.product import add_product, product
from weft.parallel.tensor.loss import check_loss, logit_gradient, token_losses
from weft.parallel.tensor.matmul import SEQUENCE_DIM, in_autocast_precision, outer_product
from weft.parallel.tensor.range import check_range


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(x weight^T + bias, targets)` with the vocabulary split over `mesh`, `chunk` tokens at a time.

    Equal to the plain loss, with equal gradients. For "mean" and "sum" the gradients are computed in the forward, with
    each chunk's logits; for "none" the backward computes the logits again.

    Shapes: x `[…, hidden]` (`[batch, sequence / tensor, hidden]` with `sequence_parallel`), weight `[vocabulary /
    tensor, hidden]` and bias `[vocabulary / tensor]`, all ranks of equal size; targets `[…]`, whole on all ranks;
    result a scalar, `[…]` for "none". `vocab_size`: the columns beyond it are padding. `chunk`: None takes as many
    tokens as there are hidden features, so that a chunk's logits are as large as the weight.

    Memory beside the gradients: a chunk's logits in float32. The weight's gradient is summed over the chunks in
    float32 at least and given out in the weight's `grad_dtype`.
    Communication: forward, one all-gather of three numbers per token (five with label smoothing), and the all-gather of
    x under sequence parallelism; backward, one all-reduce (reduce-scatter) of x's gradient.

    Raises:
        ValueError: an unknown reduction, a label smoothing outside [0, 1], a chunk below 1, or wrong shapes.
        IndexError: on a CPU, a target outside the vocabulary that is not `ignore_index`.
        RuntimeError: a second backward through one "mean" or "sum".
    """
    check_loss(reduction, label_smoothing)
    x = all_gather(x, mesh, SEQUENCE_DIM) if sequence_parallel else copy(x, mesh)
    if x.shape[:-1] != targets.shape:
        raise ValueError(f"x {list(x.shape)} needs targets {list(x.shape[:-1])}, not {list(targets.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} tokens; choose at least 1")
    full = vocab_size or weight.shape[0] * mesh.size()
    check_range(targets, full, "target", besides=ignore_index)
    held = min(max(full - mesh.get_local_rank() * weight.shape[0], 0), weight.shape[0])
    loss = _Loss(mesh, held, ignore_index, label_smoothing, chunk or weight.shape[1])
    collected = gradient_dtype(weight)
    x, weight = in_autocast_precision(x, weight)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if reduction == "none":
        losses: Tensor = _TokenLosses.apply(rows, weight, bias, flat, loss, collected)
        return losses.view(targets.shape)
    share = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if reduction == "mean":
        share = share / (flat != ignore_index).sum()
    wanted = torch.is_grad_enabled()
    result: Tensor = _ScalarLoss.apply(rows, weight, bias, flat, loss, share, collected, wanted)
    return result


@dataclass(frozen=True)
class _Loss:
    """What a chunk's loss depends on besides its tensors; `held`: this rank's columns that are not padding."""

    mesh: DeviceMesh
    held: int
    ignore_index: int
    label_smoothing: float
    chunk: int

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Any]:
        logits = product(x, weight, bias)
        logits[:, self.held :] = -torch.inf
        return token_losses(logits, targets, self.mesh, self.ignore_index, self.label_smoothing, overwrite=True)

    def parts(self, *tensors: Tensor) -> Any:
        return zip(*(tensor.split(self.chunk) for tensor in tensors), strict=True)


class _Gradients:
    """Collects the gradients of x, weight and bias chunk by chunk; None for what needs none."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> None:
        summed = torch.promote_types(weight.dtype, torch.float32)
        self.weight_factor = weight
        self.x = torch.empty_like(x) if needs[0] else None
        self.done = 0  # rows of x
        self.weight = torch.zeros_like(weight, dtype=summed) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=summed) if bias is not None and needs[2] else None

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """`gradient`: of this chunk's logits, in float32 at least."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(x.dtype)
        if self.x is not None:
            self.x[self.done : self.done + len(x)] = product(gradient, self.weight_factor.t())
        self.done += len(x)
        if self.weight is None:
            return
        if self.weight.dtype == x.dtype:
            add_product(self.weight, gradient.t(), x)
        else:
            self.weight += outer_product(gradient, x, self.weight.dtype)

    def given(self, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients, times `scale`, that of the weight in `dtype`."""
        if scale is not None:
            for gradient in (self.x, self.weight, self.bias):
                if gradient is not None:
                    gradient *= scale
        return self.x, None if self.weight is None else self.weight.to(dtype), self.bias


class _ScalarLoss(torch.autograd.Function):
    """The sum of the tokens' losses times `share`; the gradients are ready when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss: _Loss,
        share: Tensor,
        collected: torch.dtype,
        wanted: bool,
    ) -> Tensor:
        needs = tuple(wanted and needed for needed in ctx.needs_input_grad[:3])
        gradients = _Gradients(x, weight, bias, needs)
        total = torch.zeros_like(share)
        for rows, wished in loss.parts(x, targets):
            losses, softmax = loss.of(rows, weight, bias, wished)
            total += losses.sum()
            if any(needs):
                gradients.add(rows, logit_gradient(softmax, share.expand_as(losses), loss.label_smoothing))
            del softmax  # before the next chunk's logits
        ctx.gradients, ctx.collected = gradients, collected
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy were given out; compute the loss again")
        return *gradients.given(ctx.collected, gradient), None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """The tokens' losses; the backward, which alone knows each one's weight, computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss: _Loss, collected: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, targets)
        ctx.loss, ctx.collected = loss, collected
        return torch.cat([loss.of(rows, weight, bias, wished)[0] for rows, wished in loss.parts(x, targets)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, targets = ctx.saved_tensors
        gradients = _Gradients(x, weight, bias, ctx.needs_input_grad[:3])
        for rows, wished, upstream in ctx.loss.parts(x, targets, gradient):
            _, softmax = ctx.loss.of(rows, weight, bias, wished)
            gradients.add(rows, logit_gradient(softmax, upstream, ctx.loss.label_smoothing))
            del softmax  # before the next chunk's logits
        return *gradients.given(ctx.collected), None, None, None
