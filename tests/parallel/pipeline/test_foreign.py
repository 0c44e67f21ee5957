"""Plain linear layers whose weight gradients wait compute what torch computes."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.parallel.pipeline.stage import PipelineStage, Saved

SHAPE = (3, 5, 8)  # [batch, sequence, features]


class Recomputed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


def layers(kind: type[nn.Sequential] = nn.Sequential, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return kind(nn.Linear(8, 16, bias=bias), nn.Tanh(), nn.Linear(16, 8, bias=bias)).double()


def gradients(module: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> dict[str, Tensor | None]:
    """After two backwards of the same input, of which the second adds to the first."""
    for _ in range(2):
        backward(module(x))
    return {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("splits", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("received", [True, False], ids=["received", "first stage"])
@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("0.bias", "2.bias")], ids=str)
@pytest.mark.parametrize("kind", [nn.Sequential, Recomputed])
def test_equals_torch(kind: type[nn.Sequential], frozen: tuple[str, ...], received: bool, splits: bool) -> None:
    modules = [layers(kind), layers(kind)]
    for module in modules:
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
    stage = PipelineStage(modules[1], 0)
    assert stage.defer_weight_gradients()

    def split(output: Tensor) -> None:
        weight = modules[1].get_parameter("2.weight")
        before = None if weight.grad is None else weight.grad.clone()
        work = stage.backward_of_input(Saved({}, [output]), [torch.ones_like(output)])
        torch.testing.assert_close(weight.grad, before, rtol=0, atol=0)
        work()

    def whole(output: Tensor) -> None:
        output.sum().backward()

    inputs = [torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    for x in inputs:
        x.requires_grad_(received)
    expected = gradients(modules[0], inputs[0], whole)
    found = gradients(modules[1], inputs[1], split if splits else whole)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autocast_computes_as_torch_does() -> None:
    modules = [layers(bias=False).float(), layers(bias=False).float()]
    stage = PipelineStage(modules[1], 0)
    stage.defer_weight_gradients()
    x = torch.randn(SHAPE, requires_grad=True)
    for module in modules:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        if module is stage.module:
            stage.backward_of_input(Saved({}, [output]), [torch.ones_like(output)])()
        else:
            output.backward(torch.ones_like(output))
    for own, theirs in zip(modules[1].parameters(), modules[0].parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=2e-2, atol=2e-2)


def test_an_input_that_was_changed_in_place_is_refused() -> None:
    module = layers()
    PipelineStage(module, 0).defer_weight_gradients()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) * 1
    output = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


def test_recomputed_layers_hold_no_input_between_forward_and_backward() -> None:
    inputs: list[weakref.ref[Tensor]] = []

    class Watched(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            inputs.append(weakref.ref(result))
            return result

    module = Recomputed(nn.Linear(8, 16), Watched(), nn.Linear(16, 8))
    PipelineStage(module, 0).defer_weight_gradients()
    output = module(torch.randn(SHAPE, requires_grad=True))
    assert inputs[0]() is None
    output.sum().backward()
