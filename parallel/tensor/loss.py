"""Cross-entropy over a vocabulary that is split over ranks: the logits are never gathered (Shoeybi et al. 2019, §3)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.exchange import start_all_gather
from weft.parallel.tensor.range import check_range

REDUCTIONS = ("mean", "sum", "none")


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mesh: DeviceMesh,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `logits` against `targets`, equal to `torch.nn.functional.cross_entropy` on gathered logits.

    Shapes: logits `[…, vocabulary / tensor]`, this rank's columns, all ranks of equal width; targets `[…]`, whole and
    equal on all ranks. The result is a scalar for "mean" (over the targets that are not `ignore_index`) and "sum",
    `[…]` for "none". Columns of -inf are padding: no target selects them and label smoothing leaves them out.
    Computed in float32 at least.

    Communication: forward, one all-gather of three numbers per token (five with label smoothing); backward none.

    Raises:
        ValueError: an unknown reduction, a label smoothing outside [0, 1], or shapes that do not match.
        IndexError: on a CPU, a target outside the vocabulary that is not `ignore_index`.
    """
    check_loss(reduction, label_smoothing)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} need targets {list(logits.shape[:-1])}, not {list(targets.shape)}"
        )
    check_range(targets, logits.shape[-1] * mesh.size(), "target", besides=ignore_index)
    losses: Tensor = _CrossEntropy.apply(logits, targets, mesh, ignore_index, label_smoothing)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def check_loss(reduction: str, label_smoothing: float) -> None:
    """Refuse what no cross-entropy can do."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; choose a number from 0 to 1")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, mesh: DeviceMesh, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        losses, softmax = token_losses(logits, targets, mesh, ignore_index, label_smoothing)
        ctx.save_for_backward(*softmax)
        ctx.label_smoothing, ctx.dtype = label_smoothing, logits.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax = Softmax(*ctx.saved_tensors)
        probabilities = softmax.probabilities.clone()
        result = logit_gradient(softmax._replace(probabilities=probabilities), gradient, ctx.label_smoothing)
        return result.to(ctx.dtype), None, None, None, None


class Softmax(NamedTuple):
    """What the gradient of the loss needs of its forward.

    Shapes, for tokens `[…]`: probabilities of this rank's columns `[…, vocabulary / tensor]`; the target's column among
    them `[…, 1]`, whether it is one of them, and whether the token is ignored. With label smoothing also which columns
    are padding, and how many of all ranks are not.
    """

    probabilities: Tensor
    column: Tensor
    owned: Tensor
    ignored: Tensor
    padding: Tensor | None
    width: Tensor | None


def token_losses(
    logits: Tensor,
    targets: Tensor,
    mesh: DeviceMesh,
    ignore_index: int,
    label_smoothing: float,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Softmax]:
    """Loss per token, `log Σ exp z − (1 − ε) z_target − ε mean z`, without autograd; one all-gather.

    With `overwrite` the probabilities may be written over the logits.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # a rank whose columns are all padding has no largest logit
    largest = z.amax(-1).clamp_min(torch.finfo(z.dtype).min)
    column, owned = _local_targets(targets, logits.shape[-1], mesh)
    chosen = z.gather(-1, column).squeeze(-1).masked_fill(~owned, 0.0)
    padding, smoothing = None, []
    if label_smoothing:
        padding = z.isneginf()
        smoothing = [z.masked_fill(padding, 0.0).sum(-1), (~padding).sum(-1).to(z.dtype)]
    exponentials = torch.sub(z, largest.unsqueeze(-1), out=z if overwrite else None).exp_()
    terms = [largest, exponentials.sum(-1), chosen, *smoothing]
    every = _from_every_rank(torch.stack(terms), mesh)  # [ranks, terms, tokens]

    highest = every[:, 0].amax(0)
    partition = (every[:, 1] * (every[:, 0] - highest).exp()).sum(0)
    losses = highest + partition.log() - (1 - label_smoothing) * every[:, 2].sum(0)
    width = None
    if label_smoothing:
        width = every[:, 4].sum(0)
        losses -= label_smoothing * every[:, 3].sum(0) / width
    probabilities = exponentials.mul_(((largest - highest).exp() / partition).unsqueeze(-1))
    ignored = targets == ignore_index
    return losses.masked_fill_(ignored, 0.0), Softmax(probabilities, column, owned, ignored, padding, width)


def logit_gradient(softmax: Softmax, gradient: Tensor, label_smoothing: float) -> Tensor:
    """The gradient of this rank's logits from that of each token's loss; written over the probabilities."""
    result = softmax.probabilities
    if label_smoothing:
        assert softmax.width is not None
        assert softmax.padding is not None
        result -= (label_smoothing / softmax.width).unsqueeze(-1).masked_fill(softmax.padding, 0.0)
    at_target = softmax.owned.to(result.dtype) * (label_smoothing - 1)
    result.scatter_add_(-1, softmax.column, at_target.unsqueeze(-1))
    result *= gradient.masked_fill(softmax.ignored, 0.0).unsqueeze(-1)
    return result


def _from_every_rank(terms: Tensor, mesh: DeviceMesh) -> Tensor:
    """Stacked along a new first dim; summing in rank order gives all ranks the same result to the bit."""
    return terms[None] if mesh.size() == 1 else start_all_gather(terms[None], mesh, 0).wait()


def _local_targets(targets: Tensor, width: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Column of each target among this rank's, `[…, 1]` (0 for another rank's), and whether it is this rank's."""
    local = targets - mesh.get_local_rank() * width
    owned = (local >= 0) & (local < width)
    return local.masked_fill(~owned, 0).unsqueeze(-1), owned
