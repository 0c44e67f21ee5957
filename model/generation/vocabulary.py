"""Log-probabilities and the likeliest tokens from logits that are split over ranks, without gathering them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import gather


def likeliest(logits: Tensor, count: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The `count` highest logits and their tokens, highest first, of equals the one of the lower number.

    Shapes: logits `[…, vocab / tensor]`, results `[…, count]`.
    Communication: an all-gather of `count` values and numbers per rank.
    """
    if count == 1:
        token = logits.argmax(-1, keepdim=True)
        values = logits.gather(-1, token)
    else:
        values, token = logits.topk(min(count, logits.shape[-1]))
    if mesh.size() == 1:
        return values, token
    # one message; float64 holds every token's number
    both = torch.stack((values.double(), (token + mesh.get_local_rank() * logits.shape[-1]).double()), -1)
    every = gather(both, mesh, -2)
    order = torch.argsort(every[..., 0], dim=-1, descending=True, stable=True)[..., :count]
    return every[..., 0].gather(-1, order).to(values.dtype), every[..., 1].gather(-1, order).long()


def log_normalizer(logits: Tensor, mesh: DeviceMesh) -> Tensor:
    """`log Σ exp(logits)` over the whole vocabulary, `[…]` from `[…, vocab / tensor]`, in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return gather(logits.to(precise).logsumexp(-1, keepdim=True), mesh, -1).logsumexp(-1)


def logits_of(tokens: Tensor, logits: Tensor, mesh: DeviceMesh) -> Tensor:
    """The logit of one token each, `[…]`, from `[…, vocab / tensor]`."""
    local = tokens - mesh.get_local_rank() * logits.shape[-1]
    foreign = (local < 0) | (local >= logits.shape[-1])
    own = logits.gather(-1, local.masked_fill(foreign, 0).unsqueeze(-1))
    return gather(own.masked_fill(foreign.unsqueeze(-1), -torch.inf), mesh, -1).amax(-1)
