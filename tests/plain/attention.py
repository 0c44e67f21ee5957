"""Causal attention written out."""

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(Q K^T / sqrt(head_dim)) V` over earlier positions.

    Shapes: query, result `[batch, heads, sequence, head_dim]`; key, value `[batch, kv_heads, sequence, head_dim]`.
    Query head i reads key-value head `i // (heads / kv_heads)`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value
