"""What a caller gives a step, cut into microbatches and checked on the ranks that use it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from weft.parallel.pipeline.payload import Nest
from weft.parallel.pipeline.table import Schedule

Split = Callable[[Any, int], Sequence[Any]]


@dataclass(frozen=True)
class Feed:
    """One entry per microbatch.

    Attributes:
        inputs: what the first stage is called with; None on ranks without it.
        targets: what the loss function compares the last stage's outputs with; None on ranks without it, or when
            outputs are wanted instead of losses.
        keywords: keyword arguments of every stage's module.
        uniform: whether inputs and keywords have the same shapes in all microbatches, as far as this rank can see.
    """

    inputs: Sequence[Nest] | None
    targets: Sequence[Any] | None
    keywords: Sequence[Mapping[str, Any]]
    uniform: bool


class Given(NamedTuple):
    """What the caller passed to a step."""

    batch: Any
    targets: Any
    keywords: Sequence[Mapping[str, Any]] | None


def make_feed(schedule: Schedule, given: Given, *, split: Split | None, rank: int, wants_loss: bool) -> Feed:
    """Cut what the caller gave into microbatches; what this rank's stages do not use is not looked at.

    Raises:
        ValueError: something is missing or has another number of microbatches than the schedule.
    """
    count = schedule.microbatches
    is_first, is_last = schedule.placement[0] == rank, schedule.placement[-1] == rank
    inputs = _cut("batch", given.batch, count, split) if is_first else None
    targets = _cut("targets", given.targets, count, split) if is_last and wants_loss else None
    keywords = [{}] * count if given.keywords is None else given.keywords
    if len(keywords) != count:
        raise ValueError(f"keywords has {len(keywords)} entries for {count} microbatches; give one dict for each")
    return Feed(inputs, targets, keywords, _alike(inputs or ()) and _alike(given.keywords or ()))


def _cut(name: str, whole: Any, count: int, split: Split | None) -> Sequence[Any]:
    if whole is None:
        raise ValueError(f"{name} is missing on the rank that needs it; give one entry per microbatch ({count})")
    if isinstance(whole, Tensor) and split is None:
        if whole.dim() == 0 or whole.shape[0] % count:
            raise ValueError(
                f"{name} of shape {list(whole.shape)} does not divide into {count} microbatches along dim 0; "
                "give a list of microbatches or split="
            )
        return whole.chunk(count)
    parts: Sequence[Any] = split(whole, count) if split is not None and not isinstance(whole, list) else whole
    if not isinstance(parts, list | tuple):
        raise ValueError(f"{name} is a {type(whole).__name__}; give a list of microbatches, a tensor, or split=")
    if len(parts) != count:
        raise ValueError(f"{name} has {len(parts)} microbatches, but the schedule has {count}; give as many")
    return parts


def _alike(nests: Sequence[Nest]) -> bool:
    """Whether all nests hold tensors of the same shapes."""
    return len({_shapes(nest) for nest in nests}) <= 1


def _shapes(nest: Nest) -> Any:
    if isinstance(nest, Tensor):
        return nest.shape, nest.dtype
    if isinstance(nest, tuple | list):
        return tuple(map(_shapes, nest))
    if isinstance(nest, Mapping):
        return tuple((key, _shapes(part)) for key, part in nest.items())
    return None
