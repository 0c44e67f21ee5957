"""Activations on the host: the same gradients, less on the device, nothing left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from weft.launch.dry_run import dry_run
from weft.launch.settings import build_settings
from weft.parallel import ActivationOffload, recomputed, track_memory

WIDTH, ROWS, LAYERS = 32, 64, 6


class Layer(nn.Module):
    """Saves whole tensors, parts of one storage, an expanded tensor, a mask, integers, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, key: int = 0) -> Tensor:
        gate, up = self.linear(x).chunk(2, dim=-1)
        torch.manual_seed(key)
        turned = dropout(torch.sigmoid(gate) * up, 0.3).t().contiguous().t() * self.scale.expand(len(x), -1)
        order = torch.arange(len(x), device=x.device).flip(0)
        return x + torch.exp(-turned.square()).index_select(0, order)


def layers(device: str = "cpu") -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS)).to(device)


def run(parts: nn.ModuleList, offload: ActivationOffload | None, x: Tensor, *, recompute: bool = False) -> Tensor:
    for key, part in enumerate(parts):
        if offload is None:
            x = part(x, key)
            continue
        with offload.keep(part):
            x = recomputed(part, x, key) if recompute else part(x, key)
    return x


def gradients(parts: nn.ModuleList, results: list[Tensor]) -> list[Tensor]:
    parts.zero_grad()
    for result in results:
        result.sum().backward()
    return [parameter.grad.clone() for parameter in parts.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("last_first", [False, True])
def test_gradients_are_the_same_bits(recompute: bool, last_first: bool) -> None:
    """Two microbatches forward, then backward in either order."""
    parts, offload = layers(), ActivationOffload()
    inputs = [torch.randn(ROWS, WIDTH), torch.randn(ROWS // 2, WIDTH)]
    order = slice(None, None, -1 if last_first else 1)
    expected = gradients(parts, [run(parts, None, x) for x in inputs][order])
    seen = gradients(parts, [run(parts, offload, x, recompute=recompute) for x in inputs][order])
    assert len(expected) == len(list(parts.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(expected, seen, strict=True))


def test_what_is_copied_is_no_parameter_and_goes_with_the_graph() -> None:
    """A part of 64 rows keeps less than its matrix of 512 × 1,024 floats, if that is not copied."""
    wide = nn.Linear(512, 1024)
    x = torch.randn(ROWS, 512)
    with track_memory() as memory:
        with ActivationOffload().keep(wide):
            result = wide(x).tanh().sum()
        assert memory.live < wide.weight.nbytes / 2
        result.backward()
        gradient = sum(p.grad.nbytes for p in wide.parameters() if p.grad is not None)
        del result
        assert memory.live <= gradient


def held(**parallel: Any) -> float:
    """The activations of a device, counted without numbers, where what is on the host has none."""
    model = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 176}
    settings = build_settings(
        {
            "name": "offload",
            "model": model | {"num_attention_heads": 4, "num_hidden_layers": 16, "max_position_embeddings": 64},
            "parallel": parallel,
            "batch": {"global_size": 8, "micro_size": 2},
            "corpus": {"sequence_length": 64},
            "cluster": {"device": "cpu"},
        }
    )
    return dry_run(settings, settings.parallel.pipeline).memory.activations


def test_a_device_holds_about_two_layers_of_sixteen() -> None:
    whole, offloaded = held(), held(offload="activations")
    assert offloaded < whole / 4, (offloaded, whole)
    assert held(offload="activations", recompute="full") < held(recompute="full")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_are_made_beside_the_computation() -> None:
    parts, offload = layers("cuda"), ActivationOffload()
    x = torch.randn(1 << 16, WIDTH, device="cuda")
    expected = gradients(parts, [run(parts, None, x)])
    before = torch.cuda.memory_allocated()
    whole = run(parts, None, x)
    kept = torch.cuda.memory_allocated() - before
    del whole
    torch.cuda.synchronize()
    result = run(parts, offload, x)
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # the allocator takes back what other streams have used when it is asked next
    assert torch.cuda.memory_allocated() - before < kept / 2
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients(parts, [result]), strict=True))
