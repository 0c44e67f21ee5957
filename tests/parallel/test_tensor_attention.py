"""Sharded self-attention against the plain one: every gradient is whole after a plain `backward()`."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.comparison import check_gradients, close, drawn, load_full, part, tensor_mesh
from tests.plain.llama import rotate
from tests.pool import Pool
from weft.parallel import ParallelSelfAttention, WeightGradientQueue, count_traffic

HIDDEN, BATCH, SEQUENCE, THETA = 16, 2, 12, 100.0


class Case(NamedTuple):
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False
    output_bias: bool | None = None
    sequence_parallel: bool = False
    rotary: bool = True
    is_causal: bool = True
    mask: str | None = None  # boolean, added
    deferred: bool = False

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        return self.head_dim or HIDDEN // self.heads

    @property
    def biases(self) -> tuple[bool, bool]:
        return self.bias, self.bias if self.output_bias is None else self.output_bias


class PlainAttention(nn.Module):
    """Written out for any mask."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        bias, output_bias = case.biases
        self.q_proj = nn.Linear(HIDDEN, case.heads * case.size, bias, dtype=torch.float64)
        self.k_proj = nn.Linear(HIDDEN, case.kv * case.size, bias, dtype=torch.float64)
        self.v_proj = nn.Linear(HIDDEN, case.kv * case.size, bias, dtype=torch.float64)
        self.o_proj = nn.Linear(case.heads * case.size, HIDDEN, output_bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        projected = [layer(x).unflatten(-1, (-1, self.case.size)) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (heads.transpose(1, 2) for heads in projected)
        if self.case.rotary:
            q, k = rotate(q, THETA), rotate(k, THETA)
        k, v = (heads.repeat_interleave(self.case.heads // self.case.kv, 1) for heads in (k, v))
        scores = q @ k.transpose(-1, -2) / self.case.size**0.5 + added_mask(self.case, x.shape[1])
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def given_mask(case: Case, sequence: int) -> Tensor | None:
    """The mask as the caller passes it; every position attends at least to itself."""
    distance = torch.arange(sequence)[:, None] - torch.arange(sequence)
    near = distance.abs() <= 3
    if case.mask is None:
        return None
    return near if case.mask == "boolean" else (-distance.abs()).to(torch.float64) / 4


def added_mask(case: Case, sequence: int) -> Tensor:
    mask = given_mask(case, sequence)
    if mask is None:
        allowed = torch.ones(sequence, sequence, dtype=torch.bool)
        mask = allowed.tril() if case.is_causal else allowed
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return mask


def rotary_tables(size: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[sequence, head_dim]`, read off the plain rotation of ones."""
    ones = torch.ones(sequence, size, dtype=torch.float64)
    first = ones.clone()
    first[:, size // 2 :] = 0  # (1, 0) turns into (cosine, sine)
    turned = rotate(first, THETA)
    cosine, sine = turned[:, : size // 2], turned[:, size // 2 :]
    return torch.cat((cosine, cosine), -1), torch.cat((sine, sine), -1)


def build(case: Case) -> tuple[PlainAttention, ParallelSelfAttention]:
    plain = PlainAttention(case)
    layer = ParallelSelfAttention(
        HIDDEN,
        case.heads,
        case.kv_heads,
        case.head_dim,
        mesh=tensor_mesh(),
        bias=case.bias,
        output_bias=case.output_bias,
        sequence_parallel=case.sequence_parallel,
        is_causal=case.is_causal,
        dtype=torch.float64,
    )
    load_full(layer, dict(plain.named_parameters()))
    return plain, layer


def compare(cases: list[Case]) -> None:
    for case in cases:
        plain, layer = build(case)
        x, cotangent = drawn(BATCH, SEQUENCE, HIDDEN, seed=1), drawn(BATCH, SEQUENCE, HIDDEN, seed=2)
        whole = x.clone().requires_grad_()
        expected = plain(whole)
        expected.backward(cotangent)

        queue = WeightGradientQueue()
        for child in layer.modules() if case.deferred else ():
            if hasattr(child, "weight_gradient_queue"):
                child.weight_gradient_queue = queue
        scattered: dict[str, Any] = {"dim": -2, "wanted": case.sequence_parallel}
        mine = part(x, layer.mesh, **scattered).requires_grad_()
        rotary = rotary_tables(case.size, SEQUENCE) if case.rotary else None
        y = layer(mine, rotary=rotary, mask=given_mask(case, SEQUENCE))
        with queue.record() if case.deferred else nullcontext():
            y.backward(part(cotangent, layer.mesh, **scattered))
        if case.deferred:
            assert layer.q_proj.weight.grad is None
            queue.take()()
        close(y, part(expected, layer.mesh, **scattered), case)
        assert whole.grad is not None
        close(mine.grad, part(whole.grad, layer.mesh, **scattered), f"input gradient of {case}")
        check_gradients(layer, plain)


def cases(ranks: int) -> list[Case]:
    heads = 6 if ranks == 3 else 4
    some = [
        Case(heads, kv_heads, bias=bias, sequence_parallel=sequence_parallel)
        for kv_heads in ({1, ranks, heads} if ranks == 3 else {1, 2, 4})
        for bias in (False, True)
        for sequence_parallel in (False, True)
    ]
    return [
        *some,
        Case(heads, None, rotary=False),
        Case(heads, 1, head_dim=6),
        Case(heads, 1, bias=True, output_bias=False),
        Case(heads, 1, is_causal=False),
        Case(heads, 1, mask="boolean"),
        Case(heads, heads, mask="added", sequence_parallel=True),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_outputs_and_every_gradient_equal_the_plain_layer(pool: Pool, ranks: int) -> None:
    pool.run(ranks, compare, cases(ranks))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (4, 2), (2, 1)])
def test_deferred_weight_gradients_equal_the_plain_ones(
    pool: Pool, ranks: int, kv_heads: int, sequence_parallel: bool
) -> None:
    pool.run(ranks, compare, [Case(kv_heads=kv_heads, bias=True, sequence_parallel=sequence_parallel, deferred=True)])


def copies_agree() -> None:
    _, layer = build(Case(kv_heads=1))
    twin = copy.deepcopy(layer)
    x = drawn(BATCH, SEQUENCE, HIDDEN)
    assert torch.equal(twin(x), layer(x))
    meta = ParallelSelfAttention(HIDDEN, 4, 1, mesh=layer.mesh, device="meta", dtype=torch.float64)
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(meta(x), layer(x))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_copies_and_the_meta_device(pool: Pool, ranks: int) -> None:
    pool.run(ranks, copies_agree)


def measure(case: Case) -> tuple[float, float]:
    _, layer = build(case)
    x = part(drawn(BATCH, SEQUENCE, HIDDEN), layer.mesh, -2, wanted=case.sequence_parallel).requires_grad_()
    with count_traffic() as forward:
        y = layer(x)
    with count_traffic() as backward:
        y.backward(torch.ones_like(y))
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_traffic_is_that_of_the_formulas(pool: Pool, ranks: int) -> None:
    """q, k and v share one reduction of the input's gradient; kv heads on all ranks cost nothing more."""
    hidden, share = BATCH * SEQUENCE * HIDDEN * 8, (ranks - 1) / ranks
    for sent in pool.run(ranks, measure, Case()):
        assert sent == pytest.approx((2 * share * hidden, 2 * share * hidden))
    for sent in pool.run(ranks, measure, Case(sequence_parallel=True)):
        assert sent == pytest.approx((2 * share * hidden, 3 * share * hidden))


def refuse(heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ParallelSelfAttention(24, heads, kv_heads, head_dim=4, mesh=tensor_mesh())


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "message"),
    [
        (4, 6, 6, "6 attention heads do not divide over tensor 4; choose 1, 2, 3 or 6"),
        (2, 6, 3, "3 key-value heads do not divide over tensor 2; choose 1, 3 or 6"),
        (2, 1, 1, "1 attention heads do not divide over tensor 2; choose 1"),
        (1, 6, 4, "6 attention heads do not divide over 4 key-value heads; change one"),
    ],
)
def test_heads_that_do_not_divide_are_named(pool: Pool, ranks: int, heads: int, kv_heads: int, message: str) -> None:
    pool.run(ranks, refuse, heads, kv_heads, message)


def usual_sizes(kv_heads: int) -> None:
    """hidden 128, sequence 256, 8 heads: every weight gradient."""
    mesh = tensor_mesh()
    plain = nn.ModuleDict(
        {
            name: nn.Linear(128, width, bias=False, dtype=torch.float64)
            for name, width in (("q_proj", 128), ("k_proj", 16 * kv_heads), ("v_proj", 16 * kv_heads), ("o_proj", 128))
        }
    )
    layer = ParallelSelfAttention(128, 8, kv_heads, mesh=mesh, dtype=torch.float64)
    load_full(layer, dict(plain.named_parameters()))
    x, cotangent = drawn(1, 256, 128), drawn(1, 256, 128, seed=1)
    q, k, v = (plain[name](x).unflatten(-1, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    k, v = (heads.repeat_interleave(8 // kv_heads, 1) for heads in (k, v))
    scores = q @ k.transpose(-1, -2) / 4 + torch.full((256, 256), -torch.inf, dtype=torch.float64).triu(1)
    expected = plain["o_proj"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    expected.backward(cotangent)
    y = layer(x)
    y.backward(cotangent)
    close(y, expected, kv_heads)
    check_gradients(layer, plain)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_gradient_at_usual_sizes(pool: Pool, ranks: int) -> None:
    for kv_heads in (8, 2, 1):
        pool.run(ranks, usual_sizes, kv_heads)
