"""A right model, trained wrongly: targets are counted on each rank by itself, and the norm counts replicas twice."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tests.launch import broken_layers


def build(mesh: DeviceMesh) -> nn.Module:
    return broken_layers.Model(mesh)


def batch() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The first rows have fewer valid targets than the others."""
    (tokens, targets), keywords = broken_layers.batch()
    targets[:1, 3:] = -100
    return (tokens, targets), keywords


def gradient_norm(model: nn.Module, mesh: DeviceMesh) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    dist.all_reduce(square, group=mesh.get_group())
    return float(square.sqrt())
