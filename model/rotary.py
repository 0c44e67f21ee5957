"""Rotary position embeddings (Su et al. 2021)."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position / theta^(2i / head_dim)`, each `[…, head_dim]`, twice over i.

    `positions`: whole numbers `[…]`.

    Computed in float32 at least, whatever `dtype` they are returned in: half precision cannot tell positions apart.
    """
    precision = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=precision) / head_dim
    angles = positions.to(precision).unsqueeze(-1) * theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
