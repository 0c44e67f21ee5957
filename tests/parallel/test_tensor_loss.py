"""Vocabulary-parallel cross-entropy against torch's, with the gradient of the logits."""

import re
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.comparison import close, drawn, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import count_traffic, vocab_parallel_cross_entropy


class Case(NamedTuple):
    vocabulary: int = 60
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignored: str = "some"  # none, some or all of the targets
    ignore_index: int = -100
    scale: float = 1.0  # of the logits
    shape: tuple[int, ...] = (2, 6)
    dtype: torch.dtype = torch.float64

    def options(self) -> dict[str, Any]:
        names = ("reduction", "label_smoothing", "ignore_index")
        return {name: getattr(self, name) for name in names}

    def targets(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        targets = (torch.arange(count) * 7 % self.vocabulary).view(self.shape)
        every = {"none": count + 1, "some": 3, "all": 1}[self.ignored]
        return targets.masked_fill((torch.arange(count).view(self.shape) + 1) % every == 0, self.ignore_index)


CASES = [
    Case(vocabulary, reduction, label_smoothing, ignored)
    for vocabulary, reduction, label_smoothing, ignored in product(
        (60, 61, 5, 2), ("mean", "sum", "none"), (0.0, 0.1, 1.0), ("none", "some")
    )
] + [
    Case(reduction="sum", ignored="all"),
    Case(reduction="none", ignored="all", label_smoothing=0.1),
    Case(ignore_index=3),  # a token of the vocabulary
    Case(ignore_index=3, label_smoothing=0.1, vocabulary=61),
    Case(scale=1e4),  # exponentials overflow unless the largest logit is taken off
    Case(scale=1e4, label_smoothing=0.1, vocabulary=61),
    Case(shape=(12,)),
    Case(shape=()),
    Case(shape=(2, 3, 2), vocabulary=61),
    Case(dtype=torch.float32, vocabulary=61, label_smoothing=0.1),
]


def run_parallel(case: Case, logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of this rank's columns of the padded logits."""
    mesh = tensor_mesh()
    width = -(-case.vocabulary // mesh.size())
    padded = F.pad(logits, (0, width * mesh.size() - case.vocabulary), value=-torch.inf)
    mine = part(padded, mesh, -1).requires_grad_()
    before, targets = mine.detach().clone(), case.targets()
    loss = vocab_parallel_cross_entropy(mine, targets, mesh=mesh, **case.options())
    loss.backward(weight)
    assert torch.equal(mine, before), "the logits were written to"
    assert torch.equal(targets, case.targets()), "the targets were written to"
    assert mine.grad is not None
    return loss.detach(), mine.grad


def compare(cases: list[Case]) -> None:
    mesh = tensor_mesh()
    for case in cases:
        logits = (drawn(*case.shape, case.vocabulary, dtype=case.dtype) * case.scale).requires_grad_()
        targets = case.targets()
        expected = F.cross_entropy(logits.reshape(-1, case.vocabulary), targets.reshape(-1), **case.options())
        if case.reduction == "none":
            expected = expected.view(case.shape)
        weight = drawn(*expected.shape, seed=5, dtype=case.dtype)
        expected.backward(weight)
        loss, gradient = run_parallel(case, logits.detach(), weight)
        close(loss, expected, case)
        width = -(-case.vocabulary // mesh.size())
        assert logits.grad is not None
        padded = F.pad(logits.grad, (0, width * mesh.size() - case.vocabulary))
        close(gradient, part(padded, mesh, -1), f"gradient of {case}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_losses_and_gradients_equal_those_of_torch(pool: Pool, ranks: int) -> None:
    pool.run(ranks, compare, CASES)


def ignore_everything() -> tuple[float, Tensor]:
    case = Case(ignored="all")
    loss, gradient = run_parallel(case, drawn(*case.shape, case.vocabulary), torch.ones((), dtype=torch.float64))
    return loss.item(), gradient


def test_a_mean_over_no_target_is_not_a_number_as_in_torch(pool: Pool) -> None:
    case = Case(ignored="all")
    logits = drawn(case.shape[0] * case.shape[1], case.vocabulary).requires_grad_()
    F.cross_entropy(logits, case.targets().flatten()).backward()
    assert logits.grad is not None
    for loss, gradient in pool.run(2, ignore_everything):
        assert loss != loss
        expected = logits.grad.chunk(2, -1)[0].reshape(gradient.shape)
        assert torch.equal(gradient.isnan(), expected.isnan())
        assert torch.equal(gradient.nan_to_num(), expected.nan_to_num())


def half_precision() -> tuple[Tensor, Tensor]:
    mesh = tensor_mesh()
    logits = drawn(2, 6, 60, dtype=torch.bfloat16) * 8
    mine = part(logits, mesh, -1).requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, Case().targets(), mesh=mesh)
    loss.backward()
    assert mine.grad is not None
    return loss.detach(), mine.grad


def test_half_precision_logits_are_summed_in_single_precision(pool: Pool) -> None:
    logits = (drawn(2, 6, 60, dtype=torch.bfloat16) * 8).float().requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), Case().targets().flatten())
    expected.backward()
    assert logits.grad is not None
    for rank, (loss, gradient) in enumerate(pool.run(2, half_precision)):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), logits.grad.chunk(2, -1)[rank], rtol=0.01, atol=1e-4)


def test_every_rank_has_the_same_loss_to_the_bit(pool: Pool) -> None:
    for case in (Case(vocabulary=61, dtype=torch.float32), Case(vocabulary=61, label_smoothing=0.1)):
        weight = torch.ones((), dtype=case.dtype)
        logits = drawn(*case.shape, case.vocabulary, dtype=case.dtype)
        losses = [loss for loss, _ in pool.run(4, run_parallel, case, logits, weight)]
        assert all(torch.equal(loss, losses[0]) for loss in losses)


def measure(label_smoothing: float) -> tuple[int, float, int]:
    mesh = tensor_mesh()
    logits = part(drawn(2, 6, 60, dtype=torch.float32), mesh, -1).requires_grad_()
    with count_traffic() as forward:
        loss = vocab_parallel_cross_entropy(logits, Case().targets(), mesh=mesh, label_smoothing=label_smoothing)
    with count_traffic() as backward:
        loss.backward()
    return forward.messages, forward.bytes, backward.messages


@pytest.mark.parametrize(("label_smoothing", "numbers"), [(0.0, 3), (0.1, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_few_numbers_per_token_travel_and_no_logit(
    pool: Pool, ranks: int, label_smoothing: float, numbers: int
) -> None:
    for messages, sent, backward_messages in pool.run(ranks, measure, label_smoothing):
        assert messages == ranks - 1  # one all-gather, exchanged directly
        assert sent == pytest.approx((ranks - 1) * 2 * 6 * numbers * 4)
        assert backward_messages == 0


def refuse(options: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vocab_parallel_cross_entropy(logits, targets, mesh=tensor_mesh(), **options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"reduction": "average"}, (2, 3), "reduction is 'average'; choose one of mean, sum, none"),
        ({"label_smoothing": 1.5}, (2, 3), "label_smoothing is 1.5; choose a number from 0 to 1"),
        ({}, (6,), "logits [2, 3, 5] need targets [2, 3], not [6]"),
    ],
)
def test_what_cannot_be_computed_is_named(
    pool: Pool, options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    pool.run(1, refuse, options, shape, message)


def lose_outside(target: int) -> None:
    mesh = tensor_mesh()
    with pytest.raises(IndexError, match=f"target {target} is outside the vocabulary 0 … 11"):
        vocab_parallel_cross_entropy(torch.randn(2, 12 // mesh.size()), torch.tensor([3, target]), mesh=mesh)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("target", [12, -1])
def test_a_target_outside_the_vocabulary_is_refused(pool: Pool, ranks: int, target: int) -> None:
    pool.run(ranks, lose_outside, target)
