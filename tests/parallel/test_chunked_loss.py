"""Output layer and cross-entropy in chunks against the plain two, with every gradient, and what it holds."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parallel.comparison import close, drawn, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import count_traffic, linear_cross_entropy

HIDDEN = 8


class Case(NamedTuple):
    vocabulary: int = 60
    reduction: str = "mean"
    label_smoothing: float = 0.0
    chunk: int | None = 5
    bias: bool = False
    sequence_parallel: bool = False
    ignore_index: int = -100
    shape: tuple[int, ...] = (2, 12)
    dtype: torch.dtype = torch.float64

    def options(self) -> dict[str, Any]:
        names = ("reduction", "label_smoothing", "ignore_index")
        return {name: getattr(self, name) for name in names}

    def targets(self) -> Tensor:
        count = torch.arange(torch.Size(self.shape).numel())
        return (count * 7 % self.vocabulary).masked_fill(count % 3 == 2, self.ignore_index).view(self.shape)


CASES = [
    Case(vocabulary, reduction, label_smoothing, chunk)
    for vocabulary, reduction, label_smoothing, chunk in product(
        (60, 61, 2), ("mean", "sum", "none"), (0.0, 0.1), (1, 5, 24, 100, None)
    )
] + [
    Case(bias=True, vocabulary=61, reduction="none", label_smoothing=0.1),
    Case(bias=True, vocabulary=61),
    Case(sequence_parallel=True, vocabulary=61, label_smoothing=0.1),
    Case(sequence_parallel=True, reduction="none"),
    Case(ignore_index=3),
    Case(shape=(12,)),
    Case(dtype=torch.float32, vocabulary=61, label_smoothing=0.1),
    Case(dtype=torch.bfloat16, vocabulary=61),
]


def plain(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(x, weight, bias).reshape(-1, case.vocabulary)
    losses = F.cross_entropy(
        logits.to(torch.promote_types(case.dtype, torch.float32)), case.targets().reshape(-1), **case.options()
    )
    return losses.view(case.shape) if case.reduction == "none" else losses


def compare(cases: list[Case]) -> None:
    mesh = tensor_mesh()
    for case in cases:
        width = -(-case.vocabulary // mesh.size())
        pad = width * mesh.size() - case.vocabulary
        x, weight = (
            drawn(*case.shape, HIDDEN, dtype=case.dtype),
            drawn(case.vocabulary, HIDDEN, seed=1, dtype=case.dtype),
        )
        bias = drawn(case.vocabulary, seed=2, dtype=case.dtype) if case.bias else None
        whole = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
        mine = [
            part(x, mesh, -2, wanted=case.sequence_parallel).requires_grad_(),
            part(F.pad(weight, (0, 0, 0, pad)), mesh, 0).requires_grad_(),
            None if bias is None else part(F.pad(bias, (0, pad)), mesh, 0).requires_grad_(),
        ]
        expected = plain(case, *whole)
        loss = linear_cross_entropy(
            mine[0],
            mine[1],
            case.targets(),
            mine[2],
            mesh=mesh,
            sequence_parallel=case.sequence_parallel,
            vocab_size=case.vocabulary,
            chunk=case.chunk,
            **case.options(),
        )
        close(loss, expected, case)
        cotangent = drawn(*expected.shape, seed=5).to(expected.dtype)
        expected.backward(cotangent)
        loss.backward(cotangent)
        close(mine[0].grad, part(whole[0].grad, mesh, -2, wanted=case.sequence_parallel), f"x of {case}")
        close(mine[1].grad, part(F.pad(whole[1].grad, (0, 0, 0, pad)), mesh, 0), f"weight of {case}")
        if bias is not None:
            close(mine[2].grad, part(F.pad(whole[2].grad, (0, pad)), mesh, 0), f"bias of {case}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_losses_and_gradients_are_the_plain_ones(pool: Pool, ranks: int) -> None:
    pool.run(ranks, compare, CASES, timeout=120)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *made, 0)
        return result


def largest_tensor(reduction: str, chunk: int) -> int:
    x, weight = drawn(200, HIDDEN).requires_grad_(), drawn(50, HIDDEN).requires_grad_()
    with Largest() as largest:
        loss = linear_cross_entropy(
            x, weight, torch.arange(200) % 50, mesh=tensor_mesh(), reduction=reduction, chunk=chunk
        )
        loss.sum().backward()
    return largest.entries


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_all_tokens_never_exist(pool: Pool, reduction: str) -> None:
    for ranks in (1, 2):
        assert max(pool.run(ranks, largest_tensor, reduction, 40)) == 40 * 50  # one chunk, and more than x


def messages() -> tuple[Any, Any]:
    x, weight = drawn(2, 12, HIDDEN).requires_grad_(), drawn(20, HIDDEN).requires_grad_()
    with count_traffic() as forward:
        loss = linear_cross_entropy(x, weight, torch.zeros(2, 12, dtype=torch.int64), mesh=tensor_mesh(), chunk=24)
    with count_traffic() as backward:
        loss.backward()
    return forward.bytes, backward.bytes


def test_three_numbers_per_token_travel_and_the_gradient_of_x(pool: Pool) -> None:
    """An all-gather sends half of the gathered to the other of two ranks, an all-reduce the whole."""
    for forward, backward in pool.run(2, messages):
        assert forward == 3 * 24 * 8
        assert backward == 24 * HIDDEN * 8


def frozen_and_without_gradient() -> None:
    x, targets = drawn(6, HIDDEN), torch.arange(6)
    layer = nn.Linear(HIDDEN, 10, bias=False, dtype=torch.float64)
    expected = F.cross_entropy(layer(x), targets)
    with torch.no_grad():
        close(linear_cross_entropy(x, layer.weight, targets, mesh=tensor_mesh()), expected, "no grad")
    layer.weight.requires_grad_(False)
    given = x.clone().requires_grad_()
    loss = linear_cross_entropy(given, layer.weight, targets, mesh=tensor_mesh())
    loss.backward()
    assert layer.weight.grad is None
    whole = x.clone().requires_grad_()
    F.cross_entropy(layer(whole), targets).backward()
    close(given.grad, whole.grad, "x")
    with pytest.raises(RuntimeError, match="given out"):
        loss.backward()


def test_what_needs_no_gradient_gets_none(pool: Pool) -> None:
    pool.run(1, frozen_and_without_gradient)


def float32_gradients() -> list[float]:
    """Relative errors of the weight's gradient over 64 bfloat16 microbatches, as it is and collected in float32."""
    errors = []
    for wide in (False, True):
        weight = nn.Parameter(drawn(50, HIDDEN, dtype=torch.bfloat16))
        if wide:
            weight.grad_dtype = torch.float32
        exact = torch.zeros(50, HIDDEN, dtype=torch.float64)
        for microbatch in range(64):
            x = drawn(30, HIDDEN, seed=microbatch, dtype=torch.bfloat16)
            targets = torch.arange(microbatch, microbatch + 30) % 50
            linear_cross_entropy(x, weight, targets, mesh=tensor_mesh(), chunk=8).backward()
            double = weight.detach().double().requires_grad_()
            F.cross_entropy(F.linear(x.double(), double), targets).backward()
            exact += double.grad
        assert weight.grad.dtype == (torch.float32 if wide else torch.bfloat16)
        errors.append(((weight.grad.double() - exact).norm() / exact.norm()).item())
    return errors


def test_gradients_are_collected_in_the_precision_that_the_weight_asks_for(pool: Pool) -> None:
    narrow, wide = pool.run(1, float32_gradients)[0]
    assert wide < 0.3 * narrow, (narrow, wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "reduction is 'median'; choose one of mean, sum, none"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"chunk": 0}, "chunk is 0 tokens; choose at least 1"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"x \[2, 8\] needs targets \[2\], not \[3\]"),
    ],
)
def test_what_cannot_be_computed_is_named(pool: Pool, options: dict[str, Any], message: str) -> None:
    pool.run(1, refused, options, message)


def refused(options: dict[str, Any], message: str) -> None:
    targets = options.pop("targets", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(drawn(2, HIDDEN), drawn(10, HIDDEN), targets, mesh=tensor_mesh(), **options)
