"""Vocabulary-parallel embedding and head against nn.Embedding and nn.Linear."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.comparison import check_gradients, close, drawn, load_full, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import VocabParallelEmbedding, count_traffic, gather_full, shardings
from weft.parallel.tensor.embedding import VocabParallelHead

VOCABULARIES = [12, 61, 2, 5]  # divides; does not; fewer rows than ranks; a last rank with padding alone
HIDDEN, BATCH, SEQUENCE = 8, 3, 12


def tokens_of(vocabulary: int) -> Tensor:
    """Every token at least once where there is room, many twice."""
    return (torch.arange(BATCH * SEQUENCE) * 7 % vocabulary).view(BATCH, SEQUENCE)


def compare_embeddings(sequence_parallel: bool, dtype: torch.dtype) -> None:
    mesh = tensor_mesh()
    for vocabulary in VOCABULARIES:
        plain = nn.Embedding(vocabulary, HIDDEN, dtype=dtype)
        layer = VocabParallelEmbedding(vocabulary, HIDDEN, mesh=mesh, sequence_parallel=sequence_parallel, dtype=dtype)
        load_full(layer, dict(plain.named_parameters()))
        tokens, cotangent = tokens_of(vocabulary), drawn(BATCH, SEQUENCE, HIDDEN, dtype=dtype)
        before = tokens.clone()
        expected = plain(tokens)
        expected.backward(cotangent)
        y = layer(tokens)
        y.backward(part(cotangent, mesh, -2, wanted=sequence_parallel))
        assert torch.equal(tokens, before)
        close(y, part(expected, mesh, -2, wanted=sequence_parallel), vocabulary)
        check_gradients(layer, plain)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_embedding_equals_the_plain_one(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, compare_embeddings, sequence_parallel, torch.float64)
    pool.run(ranks, compare_embeddings, sequence_parallel, torch.bfloat16)


def compare_heads(sequence_parallel: bool) -> None:
    mesh = tensor_mesh()
    for vocabulary in VOCABULARIES:
        plain = nn.Linear(HIDDEN, vocabulary, bias=False, dtype=torch.float64)
        head = VocabParallelHead(
            HIDDEN, vocabulary, mesh=mesh, sequence_parallel=sequence_parallel, dtype=torch.float64
        )
        load_full(head, dict(plain.named_parameters()))
        width = -(-vocabulary // mesh.size())
        x, cotangent = drawn(BATCH, SEQUENCE, HIDDEN, seed=1), drawn(BATCH, SEQUENCE, vocabulary, seed=2)
        padding = (0, width * mesh.size() - vocabulary)
        whole, mine = x.clone().requires_grad_(), part(x, mesh, -2, wanted=sequence_parallel).requires_grad_()
        expected = plain(whole)
        expected.backward(cotangent)
        y = head(mine)
        padded = nn.functional.pad(expected, padding, value=-torch.inf)
        close(y, part(padded, mesh, -1), vocabulary)
        y.backward(part(nn.functional.pad(cotangent, padding, value=1e6), mesh, -1))
        assert whole.grad is not None
        close(mine.grad, part(whole.grad, mesh, -2, wanted=sequence_parallel), f"input gradient, {vocabulary}")
        check_gradients(head, plain)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_head_equals_the_plain_one_and_padding_never_wins(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, compare_heads, sequence_parallel)


def compare_tied(sequence_parallel: bool) -> None:
    mesh, vocabulary = tensor_mesh(), 61
    plain = nn.Embedding(vocabulary, HIDDEN, dtype=torch.float64)
    options: dict[str, Any] = {"mesh": mesh, "sequence_parallel": sequence_parallel}
    layer = VocabParallelEmbedding(vocabulary, HIDDEN, dtype=torch.float64, **options)
    before = torch.get_rng_state()
    head = VocabParallelHead(HIDDEN, vocabulary, weight=layer.weight, **options)
    assert torch.equal(torch.get_rng_state(), before), "a head that shares its weight must not draw it anew"
    load_full(layer, dict(plain.named_parameters()))
    tokens, cotangent = tokens_of(vocabulary), drawn(BATCH, SEQUENCE, vocabulary)
    (plain(tokens) @ plain.weight.t()).backward(cotangent)
    logits = head(layer(tokens))
    padding = (0, logits.shape[-1] * mesh.size() - vocabulary)
    logits.backward(part(nn.functional.pad(cotangent, padding), mesh, -1))
    check_gradients(layer, plain)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tied_gradients_add_up(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, compare_tied, sequence_parallel)


def drop_in() -> None:
    mesh = tensor_mesh()
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(4)
            plain = nn.Embedding(vocabulary, HIDDEN, dtype=dtype)
            state = torch.get_rng_state()
            torch.manual_seed(4)
            layer = VocabParallelEmbedding(vocabulary, HIDDEN, mesh=mesh, dtype=dtype)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(gather_full(layer.weight, shardings(layer)["weight"]), plain.weight)

            torch.manual_seed(4)
            plain_head = nn.Linear(HIDDEN, vocabulary, bias=False, dtype=dtype)
            torch.manual_seed(4)
            head = VocabParallelHead(HIDDEN, vocabulary, mesh=mesh, dtype=dtype)
            assert torch.equal(gather_full(head.weight, shardings(head)["weight"]), plain_head.weight)

            for module in (layer, head):
                shape = (-(-vocabulary // mesh.size()), HIDDEN)
                assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {"weight": shape}
                twin = copy.deepcopy(module)
                x = tokens_of(vocabulary) if module is layer else drawn(2, 3, HIDDEN, dtype=dtype)
                assert torch.equal(twin(x), module(x))
                assert twin.weight.data_ptr() != module.weight.data_ptr()

            meta = VocabParallelEmbedding(vocabulary, HIDDEN, mesh=mesh, device="meta", dtype=dtype)
            assert meta.weight.is_meta
            meta.to_empty(device="cpu")
            torch.manual_seed(4)
            meta.reset_parameters()
            assert torch.equal(meta.weight, layer.weight)
    assert isinstance(layer, nn.Embedding)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_drop_in_for_the_plain_embedding(pool: Pool, ranks: int) -> None:
    pool.run(ranks, drop_in)


def measure(sequence_parallel: bool) -> dict[str, tuple[float, float]]:
    mesh = tensor_mesh()
    options: dict[str, Any] = {"mesh": mesh, "sequence_parallel": sequence_parallel, "dtype": torch.float64}
    layer, head = VocabParallelEmbedding(61, HIDDEN, **options), VocabParallelHead(HIDDEN, 61, **options)
    x = part(drawn(BATCH, SEQUENCE, HIDDEN), mesh, -2, wanted=sequence_parallel).requires_grad_()
    seen = {}
    for name, module, argument in [("embedding", layer, tokens_of(61)), ("head", head, x)]:
        with count_traffic() as forward:
            y = module(argument)
        with count_traffic() as backward:
            y.backward(torch.zeros_like(y))
        seen[name] = (forward.bytes, backward.bytes)
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_traffic_is_that_of_the_formulas(pool: Pool, ranks: int) -> None:
    share, hidden = (ranks - 1) / ranks, BATCH * SEQUENCE * HIDDEN * 8
    for seen in pool.run(ranks, measure, False):
        assert seen["embedding"] == pytest.approx((2 * share * hidden, 0))
        assert seen["head"] == pytest.approx((0, 2 * share * hidden))
    for seen in pool.run(ranks, measure, True):
        assert seen["embedding"] == pytest.approx((share * hidden, share * hidden))
        assert seen["head"] == pytest.approx((share * hidden, 2 * share * hidden))


def look_up_outside(token: int) -> None:
    with pytest.raises(IndexError):
        VocabParallelEmbedding(11, 4, mesh=tensor_mesh())(torch.tensor([[3, token]]))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("token", [11, -1])
def test_a_token_outside_the_vocabulary_is_refused(pool: Pool, ranks: int, token: int) -> None:
    pool.run(ranks, look_up_outside, token)
