"""Boxes against the entry numbers of a small tensor: every entry is stored once and found again."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.parallel.checkpoint.boxes import Box, Shape, flat_run, tiles, whole
from weft.parallel.checkpoint.keys import listed

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def numbers(shape: Shape) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Shape, int, int]:
    shape = draw(SHAPES)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Shape, Box, Box]:
    shape = draw(SHAPES)

    def box() -> Box:
        starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
        return Box(starts, tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, starts, strict=True)))

    return shape, box(), box()


@given(runs())
def test_a_flat_run_is_a_few_boxes_with_the_same_entries_in_the_same_order(run: tuple[Shape, int, int]) -> None:
    shape, start, stop = run
    boxes = list(flat_run(shape, start, stop))
    parts = [numbers(shape)[box.inside(whole(shape))].reshape(-1) for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(pairs())
def test_the_overlap_is_what_both_have(pair: tuple[Shape, Box, Box]) -> None:
    shape, first, second = pair
    everything = whole(shape)
    entries = [set(numbers(shape)[box.inside(everything)].reshape(-1).tolist()) for box in (first, second)]
    common = first.overlap(second)
    found = numbers(shape)[common.inside(everything)].reshape(-1).tolist() if common else []
    assert set(found) == entries[0] & entries[1]
    if common:
        inner = numbers(shape)[first.inside(everything)][common.inside(first)]
        assert inner.reshape(-1).tolist() == found


@given(SHAPES, st.data())
def test_boxes_tile_where_each_entry_is_in_one(shape: Shape, data: st.DataObject) -> None:
    boxes = [whole(shape)]
    for _ in range(data.draw(st.integers(0, 4 if shape else 0))):  # cut one, and one of what comes of it, and so on
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        boxes += box.cut(data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 3)))
    change = data.draw(st.sampled_from(["nothing", "gone", "twice", "moved"]))
    chosen = boxes[data.draw(st.integers(0, len(boxes) - 1))]
    if change == "gone":
        boxes.remove(chosen)
    elif change == "twice":
        boxes.append(chosen)
    elif change == "moved" and shape:
        boxes[boxes.index(chosen)] = boxes[0]._replace(offset=(0,) * len(shape))
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        counts[box.inside(whole(shape))] += 1
    assert tiles(whole(shape), boxes) == bool((counts == 1).all())


@given(SHAPES.filter(bool), st.data())
def test_a_cut_box_is_whole(shape: Shape, data: st.DataObject) -> None:
    dim, parts = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 16))
    boxes = whole(shape).cut(dim, parts)
    assert len(boxes) <= parts
    found = torch.cat([numbers(shape)[box.inside(whole(shape))] for box in boxes], dim)
    assert torch.equal(found, numbers(shape))


def test_names_are_all_listed_in_few_words() -> None:
    names = [f"model/layers.{layer}.norm.weight" for layer in (0, 1, 2, 5)]
    assert listed([*names, "model/head", "a.7.b"]) == "a.7.b, model/head, model/layers.{0…2, 5}.norm.weight"
