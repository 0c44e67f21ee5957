"""Which tokens make up which step: a function of the seed and the step alone, never of the layout.

Training text is cut into windows of `sequence_length` tokens (and one more, the last target). Sample number n of a run
is one window: number n modulo the windows, in the order of its epoch. That order is a pseudo-random permutation, which
is computed and not stored, so a run goes on at any sample at once, and each data rank takes its slice of a step's.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED = -100  # the target of a position that is not counted, as in torch's cross_entropy
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15

Words = NDArray[np.uint64]


class Batch(NamedTuple):
    """Inputs and targets, int64 [samples, sequence]; targets are the inputs moved on by one token."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Batches:
    """The training samples of a run, in an endless order of epochs; each epoch has every window once.

    Args:
        tokens: token numbers [tokens], at least `sequence_length` + 1; may be memory-mapped.
        sequence_length: tokens of one sample.
        seed: of the order.

    Raises:
        ValueError: there are too few tokens for one window.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise ValueError(f"{len(tokens)} tokens are too few for one window of {sequence_length} + 1")

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """Window indices, int64 [count], of the samples `first` … `first + count - 1` of the run."""
        return self.window_indices(np.arange(first, first + count))

    def window_indices(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window of each sample number, int64 [samples]."""
        epochs, positions = np.divmod(np.asarray(sample_numbers, np.int64), self.windows)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permute(positions[chosen], self.windows, self.seed, int(epoch))
        return indices

    def batch(self, sample_numbers: NDArray[np.int64]) -> Batch:
        """The tokens of the samples numbered, counted from the start of the run."""
        return _windows(self.tokens, self.window_indices(sample_numbers), self.sequence_length)


class HeldOutBatches:
    """Held-out text in its own order: every token but the first is the target of exactly one position.

    Windows follow each other; what is beyond the last token has input 0 and target `IGNORED`, so that all windows (and
    the empty ones after the last, which fill up a batch) have one shape.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.windows = -(-(len(tokens) - 1) // sequence_length)

    def targets(self, windows: int) -> int:
        """How many targets the first `windows` windows count."""
        return min(windows * self.sequence_length, len(self.tokens) - 1)

    def batch(self, window_numbers: NDArray[np.int64]) -> Batch:
        """The tokens of the windows numbered; numbers from `windows` on give windows without any target."""
        positions = _positions(window_numbers, self.sequence_length)
        tokens = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        tokens[positions >= len(self.tokens)] = IGNORED
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        inputs[targets == IGNORED] = 0
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def _windows(tokens: np.ndarray, indices: NDArray[np.int64], sequence_length: int) -> Batch:
    rows = tokens[_positions(indices, sequence_length)].astype(np.int64)  # [samples, sequence + 1]
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))


def _positions(indices: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    starts = np.asarray(indices, np.int64)[:, None] * sequence_length
    return starts + np.arange(sequence_length + 1)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each of `positions` goes in a pseudo-random permutation of 0 … `size` - 1.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers of 2·b bits; a value that falls beyond `size` goes
    through it again until it does not (cycle walking: Black and Rogaway, 2002), in fewer than four passes on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = _mix(np.arange(_ROUNDS, dtype=np.uint64) + _mix(_word(epoch) + _mix(_word(seed))))
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (beyond := values >= size).any():
        values[beyond] = _feistel(values[beyond], half, keys)
    return values.astype(np.int64)


def _feistel(values: Words, half: int, keys: Words) -> Words:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return left << bits | right


def _mix(words: Words) -> Words:
    """Spread every input bit over all output bits (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _word(number: int) -> Words:
    return np.array([number % 2**64], dtype=np.uint64)
