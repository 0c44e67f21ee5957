"""Dropout by place: a fair coin, different wherever it should be, the same in every layout and when recomputed."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.parallel.comparison import close, drawn, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import Dropout, DropoutKey, ParallelSelfAttention

SHAPE = (4, 64, 96)  # [batch, sequence, hidden]


def key(seed: int = 1, first_sample: int = 0, batch: int = 4) -> DropoutKey:
    return DropoutKey(seed, torch.arange(first_sample, first_sample + batch))


def dropped(p: float = 0.3, place: str = "layers.0.mlp", dropout_key: DropoutKey | None = None) -> Tensor:
    return Dropout(p, place)(torch.ones(SHAPE), dropout_key or key()) == 0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_zeroed_with_probability_p_and_the_rest_scaled(p: float) -> None:
    result = Dropout(p, "place")(torch.ones(SHAPE, dtype=torch.float64), key())
    count = result.numel()
    assert (result == 0).sum().item() / count == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)
    torch.testing.assert_close(result[result != 0], torch.full_like(result[result != 0], 1 / (1 - p)))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_masks_of_other_seeds_places_and_samples_are_independent() -> None:
    first = dropped()
    others = {
        "seed": dropped(dropout_key=key(seed=2)),
        "place": dropped(place="layers.1.mlp"),
        "samples": dropped(dropout_key=key(first_sample=4)),
        "far samples": dropped(dropout_key=key(first_sample=1 << 20)),
    }
    limit = 5 / first.numel() ** 0.5
    for what, other in others.items():
        assert abs(correlation(first, other)) < limit, what


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_neighbours_are_independent(dim: int, distance: int) -> None:
    mask = dropped()
    size = mask.shape[dim] - distance
    a, b = mask.narrow(dim, 0, size), mask.narrow(dim, distance, size)
    assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5


def test_rows_are_dropped_evenly() -> None:
    """No sample, position or feature is dropped more often than chance allows."""
    mask, p = dropped().double(), 0.3
    for dims in [(1, 2), (0, 2), (0, 1)]:
        means = mask.mean(dims)
        count = mask.numel() / means.numel()
        assert (means - p).abs().max() < 5 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shard_drops_what_the_whole_drops(dim: int, ranks: int) -> None:
    dropout, x = Dropout(0.3, "place"), drawn(*SHAPE)
    whole = dropout(x, key())
    size = SHAPE[dim] // ranks
    for rank in range(ranks):
        shard = x.narrow(dim, rank * size, size)
        result = dropout(shard, key(), offset=rank * size, dim=dim, full_size=SHAPE[dim])
        assert torch.equal(result, whole.narrow(dim, rank * size, size))


def test_a_microbatch_drops_what_the_batch_drops() -> None:
    dropout, x = Dropout(0.3, "place"), drawn(*SHAPE)
    whole = dropout(x, key())
    assert torch.equal(dropout(x[2:], key(first_sample=2, batch=2)), whole[2:])


def test_backward_and_recomputation_use_the_same_mask() -> None:
    dropout = Dropout(0.3, "place")
    x, again = drawn(*SHAPE).requires_grad_(), drawn(*SHAPE).requires_grad_()
    torch.manual_seed(1)
    result = dropout(x, key())
    result.sum().backward()
    torch.manual_seed(2)  # torch's generator must not matter
    checkpoint(lambda x: dropout(x, key()).square(), again, use_reentrant=False).sum().backward()
    close(x.grad, (result != 0).double() / 0.7, "gradient")
    close(again.grad, 2 * result.detach() * x.grad, "recomputed")


def test_nothing_is_dropped_in_evaluation_or_with_probability_zero() -> None:
    x = drawn(*SHAPE)
    assert Dropout(0.3, "place").eval()(x, None) is x
    assert Dropout(0.0, "place")(x, None) is x


def test_a_missing_key_and_a_wrong_probability_are_named() -> None:
    with pytest.raises(ValueError, match=r"^layers\.0\.mlp has dropout 0\.3 but no dropout key"):
        Dropout(0.3, "layers.0.mlp")(torch.ones(SHAPE), None)
    for p in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"^dropout probability of place is {p}; choose"):
            Dropout(p, "place")


def attend_with_dropout(kv_heads: int, sequence_parallel: bool) -> Tensor:
    """The attention with dropout; the forward is the same on any number of ranks, so it goes back to the parent."""
    mesh = tensor_mesh()
    torch.manual_seed(3)
    layer = ParallelSelfAttention(
        16, 4, kv_heads, mesh=mesh, dropout=0.4, sequence_parallel=sequence_parallel, dtype=torch.float64
    )
    x = part(drawn(2, 12, 16, seed=1), mesh, -2, wanted=sequence_parallel).requires_grad_()
    y = layer(x, dropout_key=key(batch=2))
    y.backward(part(drawn(2, 12, 16, seed=2), mesh, -2, wanted=sequence_parallel))
    return torch.cat([y.detach(), x.grad], -1)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dropped_attention_does_not_depend_on_the_layout(pool: Pool, ranks: int, kv_heads: int) -> None:
    (alone,) = pool.run(1, attend_with_dropout, kv_heads, False)
    for result in pool.run(ranks, attend_with_dropout, kv_heads, False):
        close(result, alone, "whole sequence")
    close(torch.cat(pool.run(ranks, attend_with_dropout, kv_heads, True), -2), alone, "sequence parallel")


def dropped_attention_is_scaled_attention() -> None:
    """With a mean over many samples, dropout of the probabilities leaves the attention as it was."""
    mesh = tensor_mesh()
    layer = ParallelSelfAttention(16, 4, 2, mesh=mesh, dropout=0.2, dtype=torch.float64)
    x = drawn(1, 12, 16, seed=1).expand(4096, -1, -1)
    mean = layer(x, dropout_key=key(batch=4096)).mean(0)
    plain = layer.eval()(x[:1])[0]
    torch.testing.assert_close(mean, plain, rtol=0.0, atol=0.02)


def test_dropped_attention_is_unbiased(pool: Pool) -> None:
    pool.run(1, dropped_attention_is_scaled_attention)
