"""Replicas: gradients summed over the data axis while the backward runs, and the norm over all axes."""

import pytest
import torch
from torch import Tensor, nn

from tests.pool import Pool
from weft.parallel import (
    ColumnParallelLinear,
    GradientBuckets,
    ParallelSelfAttention,
    RMSNorm,
    RowParallelLinear,
    build_mesh,
    clip_gradients,
    count_traffic,
    counted_parameters,
    gradient_norm,
    shardings,
    take_shard,
)

WIDTH, LAYERS = 6, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)))


def rows(microbatch: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * microbatch + rank)
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=generator)


def reduce(ranks: int, bucket_bytes: int) -> tuple[float, int, int, int]:
    """Largest difference from one process, and the messages before, in and after the last backward."""
    mesh = build_mesh(data=ranks)["data"]
    model, plain = network(), network()
    tied = [model[0].weight]
    buckets = GradientBuckets(model.parameters(), mesh, late=tied, bucket_bytes=bucket_bytes)
    views = [parameter.grad for parameter in model.parameters()]
    for _ in range(2):  # a second step must not see the first one's gradients
        buckets.zero()
        plain.zero_grad()
        with count_traffic() as before:
            model(rows(0, mesh.get_local_rank())).square().sum().backward()
        buckets.arm()
        with count_traffic() as during:
            model(rows(1, mesh.get_local_rank())).square().sum().backward()
        with count_traffic() as after:
            buckets.finish()
        for microbatch in (0, 1):
            for rank in range(ranks):
                plain(rows(microbatch, rank)).square().sum().backward()
    assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    worst = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)  # type: ignore[operator]
    return worst, before.messages, during.messages, after.messages


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 20])
def test_gradients_are_summed_over_replicas_during_the_last_backward(pool: Pool, ranks: int, bucket_bytes: int) -> None:
    early = {1: 2 * LAYERS - 1, 600: 3, 1 << 20: 1}[bucket_bytes]
    for worst, before, during, after in pool.run(ranks, reduce, ranks, bucket_bytes):
        assert worst < 1e-12
        assert before == 0
        assert (during, after) == ((early, 1) if ranks > 1 else (0, 0))


class Block(nn.Module):
    """Every kind of declaration: split, replicated, replicated key-value heads, and one parameter without any."""

    def __init__(self, mesh: object) -> None:
        super().__init__()
        self.norm = RMSNorm(16, 1e-6, mesh=mesh, dtype=torch.float64)  # type: ignore[arg-type]
        self.attention = ParallelSelfAttention(16, 4, 2, mesh=mesh, bias=True, dtype=torch.float64)  # type: ignore[arg-type]
        self.up = ColumnParallelLinear(16, 24, mesh=mesh, dtype=torch.float64)  # type: ignore[arg-type]
        self.down = RowParallelLinear(24, 16, mesh=mesh, dtype=torch.float64)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(16, dtype=torch.float64))


def clip(tensor: int, pipeline: int) -> tuple[float, float, float]:
    """The norm, the plain norm, and the largest difference between clipped gradients and plainly clipped ones."""
    mesh = build_mesh(tensor=tensor, pipeline=pipeline)
    stage = mesh["pipeline"].get_local_rank()
    model = Block(mesh["tensor"])
    declared = shardings(model)
    full = {
        (s, name): torch.randn(
            declared[name].full_shape if name in declared else parameter.shape,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(100 * s + index),
        )
        for s in range(pipeline)
        for index, (name, parameter) in enumerate(model.named_parameters())
    }
    for name, parameter in model.named_parameters():
        gradient = full[stage, name]
        parameter.grad = take_shard(gradient, declared[name]) if name in declared else gradient.clone()
    norm = gradient_norm(counted_parameters([model], mesh["tensor"]), (mesh["tensor"], mesh["pipeline"]))
    clip_gradients(model.parameters(), norm, 0.5)
    plain = [nn.Parameter(gradient) for gradient in full.values()]
    for parameter in plain:
        parameter.grad = parameter.detach().clone()
    expected = nn.utils.clip_grad_norm_(plain, 0.5)
    clipped = dict(zip(full, plain, strict=True))
    worst = 0.0
    for name, parameter in model.named_parameters():
        gradient = clipped[stage, name].grad
        assert gradient is not None
        assert parameter.grad is not None
        gradient = take_shard(gradient, declared[name]) if name in declared else gradient
        worst = max(worst, float((parameter.grad - gradient).abs().max()))
    return float(norm), float(expected), worst


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_norm_counts_every_parameter_once_and_clips_as_torch_does(pool: Pool, tensor: int, pipeline: int) -> None:
    for norm, expected, worst in pool.run(tensor * pipeline, clip, tensor, pipeline):
        assert norm == pytest.approx(expected, rel=1e-12)
        assert worst < 1e-12
