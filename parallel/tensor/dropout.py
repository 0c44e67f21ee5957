"""Dropout that is the same in every layout: the mask is a hash of where an activation stands in the whole run.

Each rank computes the mask of its own part; shards therefore differ, replicated activations agree, and a recomputed
forward drops the same elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.parallel.random import stream_seed


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of one microbatch depend on.

    `samples`: int64 `[batch]`, each sequence's number in the whole training run, which makes masks differ from step to
    step and from sequence to sequence.
    """

    seed: int
    samples: Tensor


class Dropout(nn.Module):
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
        keep = keep_mask(key, self.place, x.shape, self.p, offset=offset, dim=dim, full_size=full_size)
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

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
    full_shape = list(shape)
    full_shape[dim] = full_size or shape[dim]
    device = key.samples.device
    index = torch.zeros((), dtype=torch.int32, device=device)
    for axis in range(1, len(shape)):
        start = offset if axis == dim else 0
        coordinate = torch.arange(start, start + shape[axis], dtype=torch.int32, device=device)
        index = index.unsqueeze(-1) * full_shape[axis] + coordinate
    constant = _signed(stream_seed(f"{key.seed}/{place}") & 0xFFFFFFFF)
    sample = _mix((key.samples & 0x7FFFFFFF).to(torch.int32) ^ constant).view(-1, *[1] * (len(shape) - 1))
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
