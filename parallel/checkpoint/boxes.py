"""Blocks of a tensor: what a rank holds of it, what a file stores of it, and what both have in common.

Every shard, in whatever layout, is a few blocks of the full tensor: they are all that a checkpoint knows of layouts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """The block of `shape` whose first entry stands at `offset`."""

    offset: Shape
    shape: Shape

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    def overlap(self, other: "Box") -> "Box | None":
        """What both have in common; None when that is nothing."""
        starts = tuple(max(pair) for pair in zip(self.offset, other.offset, strict=True))
        ends = tuple(min(pair) for pair in zip(_ends(self), _ends(other), strict=True))
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, shape) if all(length > 0 for length in shape) else None

    def inside(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds `outer`."""
        starts = (own - first for own, first in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, self.shape, strict=True))

    def moved(self, dim: int, distance: int) -> "Box":
        """The box of this shape `distance` entries further along `dim`."""
        return Box((*self.offset[:dim], self.offset[dim] + distance, *self.offset[dim + 1 :]), self.shape)

    def cut(self, dim: int, parts: int) -> "list[Box]":
        """At most `parts` boxes that make up this one along `dim`, of equal length but for the last ones."""
        if parts == 1:
            return [self]
        length = -(-self.shape[dim] // parts)
        boxes = []
        for start in range(0, self.shape[dim], length):
            shape = (*self.shape[:dim], min(length, self.shape[dim] - start), *self.shape[dim + 1 :])
            boxes.append(Box(self.offset, shape).moved(dim, start))
        return boxes


def whole(shape: Shape) -> Box:
    """All of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def tiles(outer: Box, boxes: Sequence[Box]) -> bool:
    """Whether the boxes, which lie in `outer`, make it up: each entry is in one of them.

    The mixed difference of a box's indicator function is ±1 at the corners and 0 elsewhere, and determines it: so the
    corners of the boxes must add up to those of `outer`. Takes 2^k steps for a box where boxes are cut along k dims.
    """
    filled = [box for box in boxes if box.size]
    if not outer.size:
        return not filled
    cut = [dim for dim, length in enumerate(outer.shape) if any(box.shape[dim] != length for box in filled)]
    corners = Counter(_corners(outer, cut))
    for box in filled:
        corners.subtract(_corners(box, cut))
    return bool(filled) and not any(corners.values())


def _corners(box: Box, dims: Sequence[int]) -> dict[Shape, int]:
    """The corners in some dims, each with its sign: that of the number of ends among its coordinates."""
    lines = [((box.offset[dim], 1), (box.offset[dim] + box.shape[dim], -1)) for dim in dims]
    return {tuple(at for at, _ in corner): prod(sign for _, sign in corner) for corner in product(*lines)}


def flat_run(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The boxes that make up the entries `start` … `stop` - 1 of a flattened tensor, in their order.

    At most 2 · dims - 1: a few entries of the first row, whole rows, a few entries of the last.
    """
    if start >= stop:
        return
    if not shape or stop - start == prod(shape):
        yield whole(shape)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[Box]:
    for box in flat_run(shape[1:], start, stop):
        yield Box((index, *box.offset), (1, *box.shape))


def _ends(box: Box) -> Shape:
    return tuple(start + length for start, length in zip(box.offset, box.shape, strict=True))
