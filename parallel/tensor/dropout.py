"""Dropout that is the same in every layout: the mask is a hash of where an activation stands in the whole run.

Each rank computes the mask of its own part; shards therefore differ, replicated activations agree, and a recomputed
forward drops the same elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.parallel.fused import Fusing
from weft.parallel.random import stream_seed


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of one microbatch depend on.

    `samples`: int64 `[batch]`, each sequence's number in the whole training run, which makes masks differ from step to
    step and from sequence to sequence.
    """

    seed: int
    samples: Tensor


class Dropout(Fusing):
    """Zero each element with probability `p` and scale the others by `1 / (1 − p)`.

    `place` is the name of this dropout in the model: two places draw different masks.
    """

    def __init__(self, p: float, place: str) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability of {place} is {p}; choose a number from 0 up to, not including, 1")
        self.p, self.place = p, place

    def forward(
        self, x: Tensor, key: DropoutKey | None, *, offset: int = 0, dim: int = 1, full_size: int | None = None
    ) -> Tensor:
        """Drop elements of x `[batch, …]`.

        Where x is a shard along `dim`, `offset` is its first entry in the full tensor of `full_size` entries.

        Raises:
            ValueError: there is something to drop but no key.
        """
        if not self.training or self.p == 0.0:
            return x
        if key is None:
            raise ValueError(f"{self.place} has dropout {self.p} but no dropout key; pass one, or call eval()")
        streams = sample_streams(key, self.place)
        return self.fused(_drop, x, streams, self.p, offset, dim, full_size)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def keep_mask(
    key: DropoutKey,
    place: str,
    shape: torch.Size,
    p: float,
    *,
    offset: int = 0,
    dim: int = 1,
    full_size: int | None = None,
) -> Tensor:
    """Boolean mask of `shape` `[batch, …]`: False with probability `p`, by a hash of each element's coordinates."""
    return _keep(sample_streams(key, place), shape, p, offset, dim, full_size)


def sample_streams(key: DropoutKey, place: str) -> Tensor:
    """A number for each sequence, int32 `[batch]`, from which the hashes of its elements begin."""
    constant = _signed(stream_seed(f"{key.seed}/{place}") & 0xFFFFFFFF)
    return _mix((key.samples & 0x7FFFFFFF).to(torch.int32) ^ constant)


def _drop(x: Tensor, streams: Tensor, p: float, offset: int, dim: int, full_size: int | None) -> Tensor:
    return x * _keep(streams, x.shape, p, offset, dim, full_size).to(x.dtype).mul_(1 / (1 - p))


def _keep(streams: Tensor, shape: torch.Size, p: float, offset: int, dim: int, full_size: int | None) -> Tensor:
    full_shape = list(shape)
    full_shape[dim] = full_size or shape[dim]
    device = streams.device
    index = torch.zeros((), dtype=torch.int32, device=device)
    for axis in range(1, len(shape)):
        start = offset if axis == dim else 0
        coordinate = torch.arange(start, start + shape[axis], dtype=torch.int32, device=device)
        index = index.unsqueeze(-1) * full_shape[axis] + coordinate
    sample = streams.view(-1, *[1] * (len(shape) - 1))
    # an odd multiplier of its own makes every sample walk through the hash in another order
    hashed = _mix(index * (_mix(sample + 1) | 1) + sample)
    return (hashed & 0x7FFFFFFF) >= int(p * 2**31)


def _mix(x: Tensor) -> Tensor:
    """Wellons' `lowbias32` integer hash on int32, whose products wrap around."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
