"""A small model cut into stages, and the same model run in one process: the reference of the executor's tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.parallel import PipelineExecutor, PipelineStage, Schedule, build_mesh

WIDTH = 6


class Block(nn.Module):
    """A residual block with a buffer that counts its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64)
        self.outer = nn.Linear(2 * WIDTH, WIDTH, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.outer(torch.tanh(self.inner(x)))


def mean_square(output: Any, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


def microbatches(count: int, *, seed: int, rows: Callable[[int], int] = lambda _: 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows(i), WIDTH, generator=generator, dtype=torch.float64) for i in range(count)]


def gradients(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.grad
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@dataclass
class Outcome:
    """What a run gives: the loss of each step, and the gradients by stage and name."""

    losses: list[float]
    gradients: dict[str, Tensor]


def run_serial(
    modules: Sequence[nn.Module],
    steps: Sequence[tuple[Sequence[Any], Sequence[Any]]],
    *,
    loss_function: Callable[[Any, Any], Tensor] = mean_square,
    reduction: str = "mean",
    keywords: Sequence[dict[str, Any]] | None = None,
) -> Outcome:
    """Every microbatch through all modules in turn, with nothing but autograd."""
    losses = []
    for batch, targets in steps:
        total = torch.zeros((), dtype=torch.float64)
        for index, (payload, target) in enumerate(zip(batch, targets, strict=True)):
            for module in modules:
                arguments = payload if isinstance(payload, tuple | list) else (payload,)
                payload = module(*arguments, **(keywords[index] if keywords else {}))
            loss = loss_function(payload, target) * (1 / len(batch) if reduction == "mean" else 1)
            loss.backward()
            total += loss.detach()
        losses.append(total.item())
    return Outcome(losses, gradients(modules))


def run_pipeline(
    schedule: Schedule,
    modules: Sequence[nn.Module],
    steps: Sequence[tuple[Any, Any]],
    *,
    loss_function: Callable[[Any, Any], Tensor] = mean_square,
    shared: dict[int, dict[str, str]] | None = None,
    keywords: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> Outcome:
    """The same on this rank of a pipeline; gradients are those of this rank's stages, under their serial names."""
    mesh = build_mesh(pipeline=schedule.ranks)["pipeline"]
    mine = schedule.stages_of(mesh.get_local_rank())
    stages = [PipelineStage(modules[index], index, shared=(shared or {}).get(index)) for index in mine]
    executor = PipelineExecutor(schedule, stages, mesh, loss_function, timeout=30, **options)
    losses = [executor.step(batch, targets, keywords=keywords).loss.item() for batch, targets in steps]
    kept = {name: gradient for name, gradient in gradients(modules).items() if int(name.split(".")[0]) in mine}
    return Outcome(losses, kept)


def assert_equal(pipelined: Sequence[Outcome], serial: Outcome, tolerance: float = 1e-12) -> None:
    """Every rank has the serial losses, and all ranks together the serial gradients."""
    merged = {name: gradient for outcome in pipelined for name, gradient in outcome.gradients.items()}
    assert merged.keys() == serial.gradients.keys()
    for name, gradient in serial.gradients.items():
        torch.testing.assert_close(
            merged[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for outcome in pipelined:
        torch.testing.assert_close(outcome.losses, serial.losses, rtol=tolerance, atol=tolerance)
