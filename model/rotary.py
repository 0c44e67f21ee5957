"""Rotary position embeddings (Su et al. 2021), and their scalings to texts longer than those of the training."""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from weft.model.rotary_config import Rotary


def rotary_table(positions: Tensor, head_dim: int, rotary: Rotary, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position · frequency_i`, each `[…, rotated]`, twice over i.

    `positions`: whole numbers `[…]`; scalings that depend on the length of the text take the highest for its last.

    Computed in float32 at least, whatever `dtype` they are returned in: half precision cannot tell positions apart.
    """
    precision = torch.promote_types(dtype, torch.float32)
    length = int(positions.max()) + 1 if rotary.scaling in ("dynamic", "longrope") else 0
    frequencies = rotary_frequencies(rotary, head_dim, length, device=positions.device, dtype=precision)
    angles = positions.to(precision).unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * rotary.magnitude).to(dtype), (angles.sin() * rotary.magnitude).to(dtype)


def rotary_frequencies(
    rotary: Rotary, head_dim: int, length: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Radians per position of each pair of rotated dims, `[rotated / 2]`, in a text of `length` tokens."""
    dims = rotary.rotated(head_dim)
    theta = rotary.theta
    if rotary.scaling == "dynamic":
        stretch = rotary.factor * max(length, rotary.length) / rotary.length - (rotary.factor - 1)
        theta *= stretch ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, device=device, dtype=dtype) / dims
    frequencies = 1.0 / (theta**exponents)
    if rotary.scaling == "linear":
        return frequencies / rotary.factor
    if rotary.scaling == "llama3":
        return _llama3(frequencies, rotary)
    if rotary.scaling == "yarn":
        return _yarn(frequencies, rotary, dims)
    if rotary.scaling == "longrope":
        factors = rotary.long_factors if length > rotary.length else rotary.short_factors
        return frequencies / torch.tensor(factors, device=device, dtype=dtype)
    return frequencies


def _llama3(frequencies: Tensor, rotary: Rotary) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between mixed by how often they turn in `length`."""
    turns = rotary.length * frequencies / (2 * pi)
    kept = ((turns - rotary.low) / (rotary.high - rotary.low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rotary.factor)


def _yarn(frequencies: Tensor, rotary: Rotary, dims: int) -> Tensor:
    """Dims that turn `high` times or more in `length` positions are kept, those below `low` stretched."""
    first, last = (
        dims * log(rotary.length / (turns * 2 * pi)) / (2 * log(rotary.theta)) for turns in (rotary.high, rotary.low)
    )
    if rotary.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    places = torch.arange(dims // 2, device=frequencies.device, dtype=frequencies.dtype)
    stretched = ((places - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / rotary.factor)
