"""Batches that grow: every size divides, all of the growth is used, and no sample is left out or taken twice."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from weft.launch.batch_sizes import batch_size, batch_sizes, samples_before
from weft.launch.sections import BatchSettings


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 40))
def test_sizes_grow_in_equal_steps(initial: int, levels: int, growth: int) -> None:
    batch = BatchSettings(global_size=initial * levels, initial_size=initial, growth_steps=growth)
    sizes = [batch_size(step, batch) for step in range(growth + 3)]
    assert sizes == sorted(sizes)
    assert all(size % initial == 0 for size in sizes)
    assert sizes[growth:] == [batch.global_size] * 3
    if growth:
        assert sizes[0] == initial
    if growth and growth >= levels - 1:
        assert set(sizes) == {initial * level for level in range(1, levels + 1)}
        lengths = [sizes[:growth].count(initial * level) for level in range(1, levels)]
        assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert batch_sizes(batch) == sorted(set(sizes), reverse=True)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 40))
def test_samples_follow_each_other(initial: int, levels: int, growth: int) -> None:
    batch = BatchSettings(global_size=initial * levels, initial_size=initial, growth_steps=growth)
    first = 0
    for step in range(growth + 3):
        assert samples_before(step, batch) == first
        first += batch_size(step, batch)


def test_without_an_initial_size_every_batch_is_whole() -> None:
    settings: dict[str, Any] = {"global_size": 12, "growth_steps": 5}
    batch = BatchSettings(**settings)
    assert [batch_size(step, batch) for step in range(8)] == [12] * 8
    assert batch_sizes(batch) == [12]
    assert samples_before(7, batch) == 84
