"""Norms and other parameters whose gradient each rank holds a term of: summed in the backward, or once per step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.comparison import check_gradients, close, drawn, load_full, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import (
    ColumnParallelLinear,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    count_traffic,
    defer_partial_gradients,
    reduce_partial_gradients,
)

HIDDEN, BATCH, SEQUENCE = 8, 2, 12


def compare_norms(sequence_parallel: bool, dtype: torch.dtype) -> None:
    mesh = tensor_mesh()
    for plain, layer in [
        (nn.LayerNorm(HIDDEN, 1e-3), LayerNorm(HIDDEN, 1e-3, mesh=mesh, sequence_parallel=sequence_parallel)),
        (nn.RMSNorm(HIDDEN, 1e-3), RMSNorm(HIDDEN, 1e-3, mesh=mesh, sequence_parallel=sequence_parallel)),
        (nn.RMSNorm(HIDDEN), RMSNorm(HIDDEN, mesh=mesh, sequence_parallel=sequence_parallel)),
    ]:
        assert isinstance(layer, type(plain))
        load_full(layer, {name: drawn(HIDDEN, seed=number) for number, name in enumerate(plain.state_dict())})
        plain.load_state_dict(layer.state_dict())
        plain.to(dtype)
        layer.to(dtype)
        x, cotangent = (drawn(BATCH, SEQUENCE, HIDDEN, seed=seed, dtype=dtype) for seed in (5, 6))
        whole, mine = x.clone().requires_grad_(), part(x, mesh, -2, wanted=sequence_parallel).requires_grad_()
        expected, y = plain(whole), layer(mine)
        expected.backward(cotangent)
        y.backward(part(cotangent, mesh, -2, wanted=sequence_parallel))
        assert whole.grad is not None
        close(y, part(expected, mesh, -2, wanted=sequence_parallel), plain)
        close(mine.grad, part(whole.grad, mesh, -2, wanted=sequence_parallel), plain)
        check_gradients(layer, plain)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_norms_equal_those_of_torch(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, compare_norms, sequence_parallel, torch.float64)
    pool.run(ranks, compare_norms, sequence_parallel, torch.float32)


class PlainBlock(nn.Module):
    """Every kind of partial gradient: a norm, replicated features, a row-parallel bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.wide = nn.Linear(HIDDEN, 24, dtype=torch.float64)
        self.few = nn.Linear(HIDDEN, 12, dtype=torch.float64)
        self.down = nn.Linear(24, HIDDEN, dtype=torch.float64)
        self.unused = nn.LayerNorm(HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        wide = self.wide(normed).unflatten(-1, (2, 12))  # two groups of features read the same few
        return x + self.down((wide * self.few(normed).unsqueeze(-2)).flatten(-2))


class ParallelBlock(nn.Module):
    def __init__(self, mesh: Any) -> None:
        super().__init__()
        options: dict[str, Any] = {"mesh": mesh, "sequence_parallel": True, "dtype": torch.float64}
        ranks = mesh.size()
        self.norm = LayerNorm(HIDDEN, **options)
        self.wide = ColumnParallelLinear(HIDDEN, 24, **options)
        self.few = ColumnParallelLinear(HIDDEN, 12, replicas=2 if ranks > 1 else 1, **options)
        self.down = RowParallelLinear(24, HIDDEN, **options)
        self.unused = LayerNorm(HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        wide, few = self.wide(normed), self.few(normed)
        return x + self.down((wide.unflatten(-1, (-1, few.shape[-1])) * few.unsqueeze(-2)).flatten(-2))


def interleaved(weights: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """The plain weights with the wide features in the order in which pairs of ranks share the few."""
    shards = max(1, ranks // 2)
    order = torch.arange(24).view(2, shards, 12 // shards).transpose(0, 1).flatten()
    result = {name: weight.detach().clone() for name, weight in weights.items()}
    result["wide.weight"], result["wide.bias"] = result["wide.weight"][order], result["wide.bias"][order]
    result["down.weight"] = result["down.weight"][:, order]
    return result


def accumulate(deferred: bool) -> tuple[int, int]:
    mesh = tensor_mesh()
    torch.manual_seed(2)
    plain, block = PlainBlock(), ParallelBlock(mesh)
    load_full(block, interleaved(dict(plain.named_parameters()), mesh.size()))
    if deferred:
        defer_partial_gradients(block)
    messages = []
    for microbatch in range(3):
        x, cotangent = (drawn(BATCH, SEQUENCE, HIDDEN, seed=2 * microbatch + k) for k in (5, 6))
        plain(x).backward(cotangent)
        y = block(part(x, mesh, -2))
        with count_traffic() as traffic:
            y.backward(part(cotangent, mesh, -2))
        messages.append(traffic.messages)
    with count_traffic() as traffic:
        if deferred:
            reduce_partial_gradients(block)
    for parameter in [*plain.unused.parameters(), *block.unused.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    for name, gradient in interleaved(expected, mesh.size()).items():
        plain.get_parameter(name).grad = gradient
    check_gradients(block, plain)
    return messages[0], traffic.messages


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_are_whole_summed_at_once_or_once_per_step(pool: Pool, ranks: int) -> None:
    at_once, deferred = pool.run(ranks, accumulate, False)[0], pool.run(ranks, accumulate, True)[0]
    assert at_once[1] == 0
    if ranks == 1:
        assert deferred == (0, 0)
    else:
        assert deferred[0] < at_once[0]
        assert deferred[1] == 1, "one message per step for all of them"


def unused_on_one_rank() -> Tensor | None:
    """A rank that had no use for a parameter still takes part in the sum."""
    mesh = tensor_mesh()
    norm = LayerNorm(HIDDEN, mesh=mesh, sequence_parallel=True)
    defer_partial_gradients(norm)
    if dist.get_rank() == 0:
        norm(torch.randn(3, HIDDEN)).sum().backward()
    reduce_partial_gradients(norm)
    return norm.bias.grad


def test_a_rank_without_a_gradient_adds_zero(pool: Pool) -> None:
    for gradient in pool.run(2, unused_on_one_rank):
        assert gradient is not None
        assert torch.equal(gradient, torch.full((HIDDEN,), 3.0))


def frozen() -> int:
    mesh = tensor_mesh()
    norm = LayerNorm(HIDDEN, mesh=mesh, sequence_parallel=True).requires_grad_(False)
    with count_traffic() as traffic:
        reduce_partial_gradients(norm)
    assert norm.weight.grad is None
    return traffic.messages


def test_frozen_parameters_are_left_alone(pool: Pool) -> None:
    assert pool.run(2, frozen) == [0, 0]
