"""A model of torch.nn modules that is cut into pipeline stages, rightly by `stages`; its head shares the embedding."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import split_stages


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def build(mesh: DeviceMesh) -> nn.Module:
    return Model()


def stages(model: nn.Module, count: int) -> list[nn.Module]:
    return list(split_stages(model, ["embed", "layers", "head"], count))
