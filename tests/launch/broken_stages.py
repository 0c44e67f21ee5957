"""The staged model with a layer of the last stage run twice."""

from torch import Tensor, nn

from tests.launch import staged_model
from tests.launch.staged_model import build as build


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = layer.norm, layer.linear
        self.forward_once = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_once(self.forward_once(x))  # type: ignore[no-any-return]


def stages(model: nn.Module, count: int) -> list[nn.Module]:
    parts = staged_model.stages(model, count)
    layers = parts[-1].get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[3] = Twice(layers[3])
    return parts
