"""Finding what a plan forgot: modules that see a part of the features and do not know it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from weft.parallel.exchange import start_all_gather
from weft.parallel.sharding import sharded_parameters, shardings
from weft.parallel.tensor.linear import RowParallelLinear


def check_parallel(module: nn.Module, example: Any) -> None:
    """Run a split module once on a tiny batch and name the first module that its plan forgot.

    `example`: what `module` is called with, the same on every rank: a dict of keyword arguments, a tuple of positional
    ones, or one tensor. Every rank calls this. Gradients and the training mode stay as they are.

    - A module whose parameters the plan leaves whole must read the same on every rank, and so must a column layer and
      an embedding; a row layer must read its own share of the features.
    - The gradient of every whole parameter must be the same on every rank.

    Raises:
        ValueError: names the module, what it reads and what to add to the plan.
    """
    mesh = next((sharding.mesh for sharding in shardings(module).values()), None)
    if mesh is None:
        raise ValueError("nothing in this module is split; call parallelize first")
    if mesh.size() == 1:
        return
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.enable_grad():
            _check_gradients(module, _check_inputs(module, example, mesh), mesh)
    finally:
        for child, mode in training.items():
            child.training = mode


def _check_inputs(module: nn.Module, example: Any, mesh: DeviceMesh) -> Any:
    """The module's result, when every module under it reads what it should."""
    checker = _Checker(mesh)
    handles = [
        child.register_forward_pre_hook(
            lambda owner, arguments, keywords, name=name: checker.enter(name, owner, (arguments, keywords)),
            with_kwargs=True,
        )
        for name, child in module.named_modules()
        if name
    ]
    try:
        return _call(module, example)
    except RuntimeError as error:
        raise ValueError(f"{checker.current}: {checker.reads} ({error}); is it missing in the plan?") from error
    finally:
        for handle in handles:
            handle.remove()


def _check_gradients(module: nn.Module, result: Any, mesh: DeviceMesh) -> None:
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    whole = [
        (name, parameter)
        for name, parameter, sharding in sharded_parameters(module)
        if parameter.requires_grad and (sharding is None or (sharding.dim is None and not sharding.partial_gradient))
    ]
    if not outputs or not whole:
        return
    total = torch.stack([output.double().square().mean() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, [parameter for _, parameter in whole], allow_unused=True)
    for (name, _), gradient in zip(whole, gradients, strict=True):
        if gradient is not None and not _same_everywhere(gradient, mesh):
            raise ValueError(
                f"{name} is whole on every rank, but its gradient differs between them: each rank applies it to a part "
                f'of the features; make {name.rpartition(".")[0]} "partial_gradient", or split it'
            )


class _Checker:
    """Looks at what each module is called with."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.current, self.reads = "the module itself", "its input does not fit"

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        parameters = list(module.parameters(recurse=False))
        if not parameters:
            return
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self.current = name
        self.reads = f"a {type(module).__name__} that reads {' and '.join(str(list(x.shape)) for x in tensors)}"
        if isinstance(module, RowParallelLinear):
            self._check_row(name, module, tensors)
        elif not _sums_gradients(module) and not self._alike(tensors):
            raise ValueError(
                f"{name}: {self.reads}, which differs between the ranks, but the plan takes it as whole; "
                'make it "row" if its input features are split, or "partial_gradient" if it works on each head or '
                "feature by itself"
            )

    def _check_row(self, name: str, module: RowParallelLinear, tensors: list[Tensor]) -> None:
        width, expected = tensors[0].shape[-1], module.in_features
        if module.input_is_parallel and width != expected:
            raise ValueError(
                f"{name}: a row layer reads {width} features, but this rank's share is {expected}; make the layers "
                'before it "column", or this one "row_split_input"'
            )

    def _alike(self, tensors: list[Tensor]) -> bool:
        return all(_same_everywhere(x, self.mesh) for x in tensors)


def _same_everywhere(x: Tensor, mesh: DeviceMesh) -> bool:
    """Whether all ranks have the same x, but for rounding; all ranks come to the same answer."""
    every = start_all_gather(x.detach().reshape(1, -1), mesh, 0).wait().to(torch.float64)
    if not every.numel():
        return True
    largest = every.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
    return torch.allclose(every, every[:1].expand_as(every), rtol=0.0, atol=1e-3 * largest, equal_nan=True)


def _sums_gradients(module: nn.Module) -> bool:
    declared: Mapping[str, Any] = getattr(module, "shardings", {})
    return bool(declared) and all(s.partial_gradient and s.dim is None for s in declared.values())


def _call(module: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return module(**example)
    return module(*example) if isinstance(example, tuple) else module(example)
