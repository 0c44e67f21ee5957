"""Cutting a decoder into stages: stage after stage gives what the whole gives, and every layer is in one of them."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.parallel import split_stages

PLAN = ["embed", "+positions", "layers", "norm", "head"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.linear(x).tanh()


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        length = x.shape[1]
        x = self.embed(x) + self.positions(torch.arange(length))
        for layer in self.layers:
            x = layer(x, scale=scale)
        return self.head(self.norm(x))


@settings(deadline=None, max_examples=30)
@given(layers=st.integers(1, 7), data=st.data())
def test_the_stages_one_after_the_other_are_the_model(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    model = Decoder(layers)
    parts = split_stages(model, PLAN, stages)
    tokens, scale = torch.randint(0, 20, (2, 6)), torch.tensor(0.5)
    x: Any = tokens
    for part in parts:
        x = part(x, scale=scale)
    torch.testing.assert_close(x, model(tokens, scale))
    held = [name.removeprefix("model.") for part in parts for name, _ in part.named_parameters(remove_duplicate=False)]
    whole = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(held) == sorted(whole), "every parameter in one stage, under its own name"
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter is model.get_parameter(name.removeprefix("model.")), "no copies"
    shared = {"embed.weight"} if stages > 1 else set()
    assert set(parts[0].shared) == set(parts[-1].shared) == shared
    if shared:
        assert parts[0].shared == {"embed.weight": "model.embed.weight"}
        assert parts[-1].shared == {"embed.weight": "model.head.weight"}


def test_layers_may_be_given_to_stages() -> None:
    parts = split_stages(Decoder(5), PLAN, 3, split=[0, 4, 1])
    counts = [sum(isinstance(module, Layer) for module in part.modules()) for part in parts]
    assert counts == [0, 4, 1]


@pytest.mark.parametrize(
    ("plan", "stages", "split", "message"),
    [
        (["embd", "layers"], 2, None, "'embd' is no module of Decoder"),
        (["embed", "norm"], 2, None, "has 0 nn.ModuleLists; name one"),
        (None, 2, None, "Decoder has no _pp_plan and weft has none for it; pass the names"),
        (PLAN, 6, None, "5 layers do not fill 6 stages; choose from 1 to 5"),
        (PLAN, 2, [2, 2], "split [2, 2] does not give 5 layers to 2 stages"),
        (PLAN, 2, [6, -1], "split [6, -1] does not give 5 layers to 2 stages"),
    ],
)
def test_a_wrong_plan_is_named(plan: list[str] | None, stages: int, split: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        split_stages(Decoder(5), plan, stages, split=split)
