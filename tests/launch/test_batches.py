"""Batches: a function of seed and step, in every layout, from any sample on."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.launch.batches import IGNORED, Batch, Batches, HeldOutBatches, permute
from weft.launch.batches_ahead import BatchesAhead

SEEDS = st.integers(0, 2**63)
TOKENS = np.arange(1001, dtype=np.uint16)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_permutation_is_a_bijection_for_every_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@given(size=st.integers(2**40, 2**62), seed=SEEDS, position=st.integers(0, 2**40 - 1000))
def test_permutation_of_huge_sizes_stays_inside_and_apart(size: int, seed: int, position: int) -> None:
    values = permute(np.arange(position, position + 1000), size, seed, 0)
    assert values.min() >= 0
    assert values.max() < size
    assert len(set(values.tolist())) == 1000


@given(seed=SEEDS, epoch=st.integers(0, 1000))
def test_seeds_and_epochs_have_orders_of_their_own(seed: int, epoch: int) -> None:
    order = permute(np.arange(500), 500, seed, epoch)
    for other in (permute(np.arange(500), 500, seed + 1, epoch), permute(np.arange(500), 500, seed, epoch + 1)):
        assert np.count_nonzero(order == other) < 25  # of two random orders, one place in common is the mean


def test_order_is_as_random_as_a_shuffle() -> None:
    """Mean, spread and neighbour correlation of the windows that one position gets over many epochs."""
    orders = np.stack([permute(np.arange(64), 64, 7, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, position], minlength=64) for position in range(64)])
    chi_squared = ((counts - 4000 / 64) ** 2 / (4000 / 64)).sum() / (63 * 63)
    assert chi_squared == pytest.approx(1.0, abs=0.15)
    assert abs(np.corrcoef(orders[:, 3], orders[:, 4])[0, 1] + 1 / 63) < 0.06


@settings(deadline=None)
@given(length=st.integers(1, 60), seed=SEEDS, epoch=st.integers(0, 5))
def test_each_window_stands_once_in_an_epoch(length: int, seed: int, epoch: int) -> None:
    batches = Batches(TOKENS, length, seed)
    numbers = batches.samples(epoch * batches.windows, batches.windows)
    assert sorted(numbers) == list(range(1000 // length))


@settings(deadline=None)
@given(step=st.integers(0, 10**9), data=st.sampled_from([1, 2, 4, 8]), seed=SEEDS)
def test_slices_of_a_layout_are_the_global_batch(step: int, data: int, seed: int) -> None:
    batches = Batches(TOKENS, 10, seed)
    numbers = np.arange(step * 16, step * 16 + 16)
    whole = batches.batch(numbers)
    parts = [batches.batch(part) for part in np.split(numbers, data)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_a_resumed_run_goes_on_where_the_first_would() -> None:
    whole = Batches(TOKENS, 7, 3).samples(0, 1000)
    for first in (1, 141, 142, 143, 999):
        assert np.array_equal(Batches(TOKENS, 7, 3).samples(first, 1000 - first), whole[first:])


def test_batch_is_windows_and_their_next_tokens() -> None:
    batches = Batches(TOKENS, 10, 5)
    numbers = np.array([0, 250, 3])
    inputs, targets = batches.batch(numbers)
    starts = torch.from_numpy(batches.window_indices(numbers)) * 10
    expected = starts[:, None] + torch.arange(10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, expected)
    assert torch.equal(targets, expected + 1)


def test_large_token_numbers_and_files_are_read_as_they_are(tmp_path) -> None:
    np.save(tmp_path / "tokens.npy", np.full(33, 4_000_000_000, np.uint32))
    inputs, _ = Batches(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 16, 0).batch(np.arange(2))
    assert inputs.unique().tolist() == [4_000_000_000]


def test_too_few_tokens_are_refused() -> None:
    assert Batches(TOKENS[:11], 10, 0).windows == 1
    with pytest.raises(ValueError, match="10 tokens are too few for one window of 10"):
        Batches(TOKENS[:10], 10, 0)


@given(size=st.integers(2, 300), length=st.integers(1, 70), extra=st.integers(0, 3))
def test_held_out_windows_count_every_target_once(size: int, length: int, extra: int) -> None:
    batches = HeldOutBatches(TOKENS[:size], length)
    inputs, targets = batches.batch(np.arange(batches.windows + extra))
    assert inputs.shape == targets.shape == (batches.windows + extra, length)
    counted = targets != IGNORED
    assert targets[counted].tolist() == list(range(1, size))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert not inputs[~counted].any()
    assert [batches.targets(n) for n in range(batches.windows + 1)] == [
        int(counted[:n].sum()) for n in range(batches.windows + 1)
    ]


def test_the_next_batch_is_read_ahead_in_any_order_of_steps() -> None:
    begun: list[int] = []
    reading = threading.Event()

    def read(step: int) -> Batch:
        begun.append(step)
        if step == 4:
            reading.set()
        if step == 99:
            raise OSError("the disk is gone")
        return Batch(torch.tensor([step]), torch.tensor([step + 1]))

    ahead = BatchesAhead(read, torch.device("cpu"))
    assert ahead.take(3).inputs.tolist() == [3]
    assert reading.wait(60), "the next step's batch is read though nobody has asked for it"
    assert ahead.take(4).inputs.tolist() == [4]
    assert ahead.take(9).inputs.tolist() == [9]
    assert ahead.take(10, last=True).targets.tolist() == [11]
    assert begun == [3, 4, 5, 9, 10]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(99)
