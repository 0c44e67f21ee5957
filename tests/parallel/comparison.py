"""Holding a parallel layer against the plain one, on a rank: the same weights, every gradient."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import build_mesh, gather_full, shardings, take_shard

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}


def tensor_mesh() -> DeviceMesh:
    """The tensor axis over the whole world."""
    return build_mesh(tensor=dist.get_world_size())["tensor"]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(x: Tensor, mesh: DeviceMesh, dim: int, *, wanted: bool = True) -> Tensor:
    """This rank's equal part of `x` as a new tensor, or all of `x` when a part is not `wanted`."""
    return (x.chunk(mesh.size(), dim)[mesh.get_local_rank()] if wanted else x).clone()


def load_full(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give every parameter of the parallel `module` this rank's shard of the plain one."""
    declared = shardings(module)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            sharding = declared.get(name)
            parameter.copy_(take_shard(weights[name], sharding) if sharding else weights[name])


def check_gradients(module: nn.Module, plain: nn.Module) -> None:
    """Every gradient: gathered it is the plain one's, and each rank has all of what it holds."""
    declared = shardings(module)
    for name, expected in plain.named_parameters():
        gradient = module.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert expected.grad is not None
        close(gather_full(gradient, declared.get(name)), expected.grad, f"gradient of {name}")
        sharding = declared.get(name)
        own = take_shard(expected.grad, sharding) if sharding else expected.grad
        close(gradient, own, f"this rank's gradient of {name}")


def close(seen: Tensor | None, expected: Tensor | None, what: Any) -> None:
    """Equal within the precision's tolerance; `what` is named otherwise."""
    assert seen is not None, what
    assert expected is not None, what
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")
