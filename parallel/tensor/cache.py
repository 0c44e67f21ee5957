"""Keys and values of tokens seen before, so that generating a token computes attention for that token alone.

A cache has a fixed number of slots, each with room for one sequence. The token at position p of a sequence stands at
entry p of its slot: sequences of different lengths lie beside each other without padding, and a slot is used again
without being cleared, since no token attends beyond its own position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Room for `slots` sequences of `capacity` tokens in the layers of one stage, this rank's key-value heads of them.

    Shapes: keys and values of each layer `[slots, kv_heads / tensor, capacity, head_dim]`.
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
        self.slots, self.capacity, self.kv_heads = slots, capacity, kv_heads
        shape = (slots, kv_heads, capacity, head_dim)
        # zeros, because 0 times what an unused entry happens to hold must not be NaN
        self.keys = {name: torch.zeros(shape, device=device, dtype=dtype) for name in layers}
        self.values = {name: torch.zeros(shape, device=device, dtype=dtype) for name in layers}

    @property
    def bytes(self) -> int:
        """Memory that the cache holds on this rank."""
        return sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())

    def open(
        self,
        first: int,
        positions: Tensor,
        length: int,
        *,
        lengths: Sequence[int] | None = None,
        fresh: bool = False,
    ) -> "CachedTokens":
        """The cache as one forward uses it.

        Args:
            first: slot of the first row; the rows are consecutive slots.
            positions: of the new tokens, `[rows, queries]`. Rows that are shorter may repeat a position or end in
                positions that are overwritten later, as long as every entry up to a token that matters is written.
            length: entries that the forward looks at, more than every position.
            lengths: tokens of each row, new ones included; None: up to its last position.
            fresh: every row begins at position 0 and its positions count up by one.
        """
        heads = torch.arange(self.kv_heads * positions.shape[0], device=positions.device) + first * self.kv_heads
        places = heads.view(-1, self.kv_heads, 1) * self.capacity + positions[:, None]  # [rows, kv_heads, queries]
        entries = places.flatten()
        if lengths is None:
            lengths = (positions.amax(1) + 1).tolist()
        return CachedTokens(self, first, positions, length, lengths, entries, fresh)

    def branch(self, first: int, parents: Sequence[int], length: int) -> None:
        """Let consecutive slots hold the first `length` tokens of the slots `parents`, which may be some of them."""
        for stored in (*self.keys.values(), *self.values.values()):
            stored[first : first + len(parents), :, :length] = stored[list(parents), :, :length]


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of one forward, and what of the cache they look at.

    Attributes:
        positions: `[rows, queries]`.
        lengths: tokens of each row, new ones included.
        fresh: new tokens look only at each other, causally.
    """

    cache: KeyValueCache
    first: int
    positions: Tensor
    length: int
    lengths: Sequence[int]
    entries: Tensor
    fresh: bool
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask_within(self, window: int | None) -> Tensor | None:
        """What is added to the scores, `[rows, 1, queries, length]`, where tokens look at themselves and the
        `window - 1` before them (None: at all before); None where the new tokens look at all that there is.

        One tensor serves all layers with that window.
        """
        if self.fresh:
            return None
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        bounded = window is not None and window < self.length
        if not bounded and self.positions.shape[1] == 1 and min(self.lengths) == self.length:
            return None
        entries = torch.arange(self.length, device=self.positions.device)
        positions = self.positions[:, None, :, None]
        hidden = entries > positions
        if window is not None and bounded:
            hidden |= entries <= positions - window
        dtype = next(iter(self.cache.keys.values())).dtype
        return torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, -torch.inf)

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
        stored.flatten(0, 2).index_copy_(0, tokens.entries, new.flatten(0, 2))
        if tokens.fresh:
            return new
        return stored[tokens.first : tokens.first + new.shape[0], :, : tokens.length]


class ContextCache(KeyValueCache):
    """Keys and values of contexts that do not grow, such as an encoder's output, one in each slot."""

    def __init__(self, layers: Iterable[str], *, slots: int, capacity: int, **options: Any) -> None:
        super().__init__(layers, slots=slots, capacity=capacity, **options)
        self.lengths = [1] * slots
        self._numbers, self._begun = [0] * slots, 0

    def begin(self, first: int, lengths: Sequence[int]) -> None:
        """Take consecutive slots for contexts of so many tokens."""
        for slot, length in enumerate(lengths, first):
            self._begun += 1
            self.lengths[slot], self._numbers[slot] = length, self._begun

    def keep(self, name: str, first: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values, each `[rows, kv_heads / tensor, tokens, head_dim]`."""
        for stored, new in ((self.keys[name], k), (self.values[name], v)):
            stored[first : first + len(new), :, : new.shape[2]] = new

    def share(self, first: int, parents: Sequence[int]) -> None:
        """Let consecutive slots hold the contexts of the slots `parents`."""
        slots = range(first, first + len(parents))
        if [self._numbers[slot] for slot in slots] != [self._numbers[parent] for parent in parents]:
            # beams of one text have the same context, which is copied once
            self.branch(first, parents, max(self.lengths[parent] for parent in parents))
        self.lengths[first : slots.stop] = [self.lengths[parent] for parent in parents]
        self._numbers[first : slots.stop] = [self._numbers[parent] for parent in parents]

    def view(self, first: int, rows: int) -> "Contexts":
        """The contexts of consecutive slots."""
        lengths = self.lengths[first : first + rows]
        longest = max(lengths)
        part = slice(first, first + rows)
        stored = {
            name: (self.keys[name][part, :, :longest], self.values[name][part, :, :longest]) for name in self.keys
        }
        mask = None
        if min(lengths) < longest and stored:
            like = next(iter(self.keys.values()))
            hidden = torch.arange(longest, device=like.device) >= torch.tensor(lengths, device=like.device)[:, None]
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
        return Contexts(stored, mask)


@dataclass(frozen=True)
class Contexts:
    """What a forward looks at beside its own text.

    Attributes:
        layers: each layer's keys and values, `[rows, kv_heads / tensor, longest, head_dim]`.
        mask: added to the scores, `[rows, 1, 1, longest]`; None where all contexts are equally long.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    mask: Tensor | None
