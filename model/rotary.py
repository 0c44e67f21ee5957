"""Rotary position embeddings (Su et al. 2021), and their scalings to texts longer than those of the training."""

from collections.abc import Sequence
from math import ceil, floor, log, pi

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.rotary_config import Rotary

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines."""


def rotary_table(
    positions: Tensor, head_dim: int, rotary: Rotary, *, dtype: torch.dtype, length: int | None = None
) -> RotaryTable:
    """Cosines and sines of the angles `position · frequency_i`, each `[…, rotated]`, twice over i.

    `positions`: whole numbers `[…]`. `length`: of the text, where the scaling depends on it; None: up to the last of
    the positions.

    Computed in float32 at least, whatever `dtype` they are returned in: half precision cannot tell positions apart.
    """
    precision = torch.promote_types(dtype, torch.float32)
    if length is None:
        length = int(positions.max()) + 1 if rotary.by_length else 0
    frequencies = rotary_frequencies(rotary, head_dim, length, device=positions.device, dtype=precision)
    angles = positions.to(precision).unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * rotary.magnitude).to(dtype), (angles.sin() * rotary.magnitude).to(dtype)


class StoredTables:
    """The tables of rotary positions up to the highest seen, computed once, for generation.

    Texts of lengths that differ may lie beside each other: each has the frequencies of its own length.
    """

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim
        self._tables: dict[tuple[Rotary, int, torch.dtype], Tensor] = {}  # [size, 2 · rotated]

    def at(
        self, positions: Tensor, lengths: Sequence[int], rotary: Rotary, *, size: int, dtype: torch.dtype
    ) -> RotaryTable:
        """Cosines and sines, each `[rows, 1, queries, rotated]`, for all heads.

        Args:
            positions: `[rows, queries]`, below `size`.
            lengths: tokens of each row's text, those of this forward among them.
        """
        # texts within the training's length, or beyond it with one factor, share their table
        kinds = [rotary.kind_of_length(length) for length in lengths] if rotary.by_length else [0]
        if min(kinds) == max(kinds):
            return self._look_up(positions, rotary, kinds[0], size, dtype)
        rows = [self._look_up(row[None], rotary, kind, size, dtype) for row, kind in zip(positions, kinds, strict=True)]
        cosines, sines = zip(*rows, strict=True)
        return torch.cat(cosines), torch.cat(sines)

    def _look_up(self, positions: Tensor, rotary: Rotary, kind: int, size: int, dtype: torch.dtype) -> RotaryTable:
        if rotary.scaling == "dynamic" and kind:  # another table with every token
            return rotary_table(positions.unsqueeze(1), self._head_dim, rotary, dtype=dtype, length=kind)
        table = self._table(size, rotary, kind, positions.device, dtype)
        cosines, sines = F.embedding(positions.unsqueeze(1), table).chunk(2, -1)
        return cosines, sines

    def _table(self, size: int, rotary: Rotary, kind: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        found = self._tables.get((rotary, kind, dtype))
        if found is None or len(found) < size:
            everything = torch.arange(size, device=device)
            found = torch.cat(rotary_table(everything, self._head_dim, rotary, dtype=dtype, length=kind), -1)
            self._tables[rotary, kind, dtype] = found
        return found


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
