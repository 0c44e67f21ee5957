"""Keys and values of tokens seen before, so that generating a token computes attention for that token alone.

A cache has a fixed number of slots, each with room for one sequence. The token at position p of a sequence stands at
entry p of its slot: sequences of different lengths lie beside each other without padding, and a slot is used again
without being cleared, since no token attends beyond its own position.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """Room for `slots` sequences of `capacity` tokens in the layers of one stage, this rank's key-value heads of them.

    Shapes: keys and values of each layer `[slots · capacity, kv_heads / tensor, head_dim]`.
    """

    def __init__(
        self,
        layers: Iterable[str],
        *,
        slots: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.slots, self.capacity = slots, capacity
        shape = (slots * capacity, kv_heads, head_dim)
        # zeros, because 0 times what an unused entry happens to hold must not be NaN
        self.keys = {name: torch.zeros(shape, device=device, dtype=dtype) for name in layers}
        self.values = {name: torch.zeros(shape, device=device, dtype=dtype) for name in layers}

    @property
    def bytes(self) -> int:
        """Memory that the cache holds on this rank."""
        return sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())

    def open(self, first: int, positions: Tensor, length: int, *, fresh: bool = False) -> "CachedTokens":
        """The cache as one forward uses it.

        Args:
            first: slot of the first row; the rows are consecutive slots.
            positions: of the new tokens, `[rows, queries]`. Rows that are shorter may repeat a position or end in
                positions that are overwritten later, as long as every entry up to a token that matters is written.
            length: entries that the forward looks at, more than every position.
            fresh: every row begins at position 0 and its positions count up by one.
        """
        rows = torch.arange(first, first + positions.shape[0], device=positions.device)
        entries = (rows[:, None] * self.capacity + positions).flatten()
        visible = torch.arange(length, device=positions.device)
        mask = None if fresh else visible <= positions[:, None, :, None]  # [rows, 1, queries, length]
        return CachedTokens(self, first, positions, length, entries, mask)


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of one forward, and what of the cache they look at.

    Attributes:
        positions: `[rows, queries]`.
        mask: `[rows, 1, queries, length]`, True where a query may look; None where new tokens look only at each other,
            causally.
    """

    cache: KeyValueCache
    first: int
    positions: Tensor
    length: int
    entries: Tensor
    mask: Tensor | None

    def mask_within(self, window: int | None) -> Tensor | None:
        """The mask of a layer whose tokens look at themselves and the `window - 1` before them; None: at all before."""
        if self.mask is None or window is None or window >= self.length:
            return self.mask
        visible = torch.arange(self.length, device=self.positions.device)
        return self.mask & (visible > self.positions[:, None, :, None] - window)

    def layer(self, name: str) -> "CachedLayer":
        return CachedLayer(self, self.cache.keys[name], self.cache.values[name])


@dataclass(frozen=True)
class CachedLayer:
    """One layer's part of `CachedTokens`."""

    tokens: CachedTokens
    keys: Tensor
    values: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all tokens that the queries may look at.

        Shapes: k and v `[rows, kv_heads / tensor, queries, head_dim]`; results `[rows, kv_heads / tensor, length,
        head_dim]`.
        """
        return self._extend(self.keys, k), self._extend(self.values, v)

    def _extend(self, stored: Tensor, new: Tensor) -> Tensor:
        tokens = self.tokens
        stored.index_copy_(0, tokens.entries, new.transpose(1, 2).flatten(0, 1))
        if tokens.mask is None:
            return new
        slots = stored.unflatten(0, (-1, tokens.cache.capacity))  # type: ignore[no-untyped-call]
        seen: Tensor = slots[tokens.first : tokens.first + new.shape[0], : tokens.length]
        return seen.transpose(1, 2)
