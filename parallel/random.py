"""One seed, any layout: initial weights and dropout masks that do not depend on how the model is split.

Weights: every parameter is drawn as its full, unsharded self would be, from the seed and its global name, in blocks of
rows with a random stream each; a rank draws the blocks that it needs and keeps its slices, so no rank holds a large
parameter whole.

Dropout: whether an activation is dropped is a hash of the seed, the step, the place in the model, the sample's number
in the whole training run and the position inside the sample. Any rank can compute the mask of any part, and a
recomputed forward finds the same one.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor, nn

from weft.parallel.sharding import Sharding, Slice, sharded_parameters

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    deviation: float

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        block.normal_(0.0, self.deviation, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Uniform between `-bound` and `bound`."""

    bound: float

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        block.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """One value."""

    value: float

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        block.fill_(self.value)


Distribution = Normal | Uniform | Constant
Rule = Callable[[str, nn.Module, tuple[int, ...]], Distribution]


def torch_defaults(name: str, owner: nn.Module, full_shape: tuple[int, ...]) -> Distribution:
    """What torch.nn draws for linear layers, embeddings and norms.

    Raises:
        ValueError: the module that owns the parameter is of another kind.
    """
    if isinstance(owner, nn.Linear):
        return Uniform(1 / sqrt(getattr(owner, "full_in_features", owner.in_features)))
    if isinstance(owner, nn.Embedding):
        return Normal(1.0)
    if len(full_shape) == 1 and "norm" in type(owner).__name__.lower():
        return Constant(0.0 if name.endswith("bias") else 1.0)
    raise ValueError(f"no initial distribution is known for {name} of {type(owner).__name__}; pass a rule for it")


def initialize(module: nn.Module, seed: int, rule: Rule = torch_defaults) -> None:
    """Draw every parameter of `module` from `seed` and its name, the same in every layout.

    `rule` gives the distribution of a parameter from its name, the module that owns it and its full shape. Values are
    drawn in float32 on the CPU and then converted, so that they do not depend on device and precision either. Nothing
    is drawn for parameters on the meta device.
    """
    for name, parameter, sharding in sharded_parameters(module):
        if parameter.is_meta:
            continue
        full_shape = tuple(parameter.shape) if sharding is None else sharding.full_shape
        distribution = rule(name, module.get_submodule(name.rpartition(".")[0]), full_shape)
        _draw(parameter, full_shape, sharding, distribution, f"{seed}/{name}")


@torch.no_grad()
def _draw(
    parameter: Tensor, full_shape: tuple[int, ...], sharding: Sharding | None, distribution: Distribution, key: str
) -> None:
    parameter.zero_()
    dim = None if sharding is None else sharding.dim
    for start, stop in _row_blocks(full_shape):
        rows = [Slice(start, start, stop - start)]
        if sharding is not None and dim == 0:
            rows = [overlap for part in sharding.slices() if (overlap := _intersect(part, start, stop))]
        if not rows:
            continue
        block = torch.empty((stop - start, *full_shape[1:]))
        distribution.fill(block, torch.Generator().manual_seed(stream_seed(f"{key}/{start}")))
        for row in rows:
            source = block[row.full_start - start :][: row.length]
            target = parameter[row.local_start :][: row.length] if full_shape else parameter.view(1)
            columns = sharding.slices() if sharding is not None and dim else None
            _copy_columns(target, source, dim, columns)


def _copy_columns(target: Tensor, source: Tensor, dim: int | None, columns: list[Slice] | None) -> None:
    if columns is None or dim is None:
        target.copy_(source)
        return
    for part in columns:
        held = source.narrow(dim, part.full_start, part.length)
        target.narrow(dim, part.local_start, part.length).copy_(held)


def _row_blocks(full_shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = full_shape[0] if full_shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, prod(full_shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _intersect(part: Slice, start: int, stop: int) -> Slice | None:
    low, high = max(part.full_start, start), min(part.full_start + part.length, stop)
    return Slice(low, part.local_start + low - part.full_start, high - low) if low < high else None


def stream_seed(key: str) -> int:
    """A 63-bit seed for the random stream of that name."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
