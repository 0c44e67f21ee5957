"""Gradients of which each rank holds one term of a sum: norms under sequence parallelism, replicated key-value heads.

By default a layer adds the terms in its backward, so that `backward()` leaves whole gradients, as for any torch module.
A training loop that accumulates over microbatches can put the sums off and do them once per step, in one message:
`defer_partial_gradients(model)` once, then `reduce_partial_gradients(model)` before each optimiser step.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.exchange import start_all_reduce
from weft.parallel.sharding import Sharding, sharded_parameters


class ShardedModule(nn.Module):
    """A module that declares `shardings` and uses its parameters through `used`."""

    shardings: dict[str, Sharding]
    partial_gradients_deferred: bool = False

    def used(self, name: str) -> Any:
        """The parameter (None: absent) as the forward is to use it: with partial gradients summed in the backward."""
        parameter: Tensor | None = getattr(self, name)
        sharding = self.shardings.get(name)
        if parameter is None or sharding is None or self.partial_gradients_deferred:
            return parameter
        if not sharding.partial_gradient or sharding.mesh.size() == 1:
            return parameter
        return _WholeGradient.apply(parameter, sharding)


def defer_partial_gradients(module: nn.Module) -> None:
    """Leave partial gradients as they are in the backward; `reduce_partial_gradients` will sum them."""
    for child in module.modules():
        if isinstance(child, ShardedModule):
            child.partial_gradients_deferred = True


@torch.no_grad()
def reduce_partial_gradients(module: nn.Module) -> None:
    """Sum the deferred partial gradients over their ranks, in place, in one message per mesh axis and precision."""
    partial = []
    for _, parameter, sharding in sharded_parameters(module):
        if parameter.requires_grad and _is_partial(sharding):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            partial.append((parameter.grad, sharding))
    sum_partial_gradients(partial)


@torch.no_grad()
def sum_partial_gradients(gradients: Iterable[tuple[Tensor, Sharding | None]]) -> None:
    """Sum those of the gradients that are partial over their ranks, in place.

    They may be parts of gradients, the same part on all ranks of the sharding's mesh.
    """
    groups: dict[tuple[DeviceMesh, torch.dtype], list[tuple[Tensor, Sharding]]] = defaultdict(list)
    for gradient, sharding in gradients:
        if sharding is not None and _is_partial(sharding) and gradient.numel():
            groups[sharding.mesh, gradient.dtype].append((gradient, sharding))
    for (mesh, _), entries in groups.items():
        for (gradient, _), total in zip(entries, _sum_terms(entries, mesh), strict=True):
            gradient.copy_(total)


def _is_partial(sharding: Sharding | None) -> bool:
    return sharding is not None and sharding.partial_gradient and sharding.mesh.size() > 1


def _sum_terms(entries: Iterable[tuple[Tensor, Sharding]], mesh: DeviceMesh) -> list[Tensor]:
    """Each entry's sum over the ranks that share its shard.

    Every different shard has a slot of its own in the message; a rank fills the slot of its shard and leaves the others
    zero, so that one all-reduce over the whole axis serves all groups of replicas.
    """
    entries = list(entries)
    slots = [gradient.new_zeros((sharding.shards, gradient.numel())) for gradient, sharding in entries]
    own = [mesh.get_local_rank() // sharding.replicas if sharding.shards > 1 else 0 for _, sharding in entries]
    for (gradient, _), slot, index in zip(entries, slots, own, strict=True):
        slot[index] = gradient.reshape(-1)
    message = torch.cat([slot.reshape(-1) for slot in slots])
    summed = start_all_reduce(message, mesh, overwrite=True).wait().split([slot.numel() for slot in slots])
    return [
        flat.view_as(slot)[index].view_as(gradient)
        for (gradient, _), slot, index, flat in zip(entries, slots, own, summed, strict=True)
    ]


class _WholeGradient(torch.autograd.Function):
    """Identity forward; backward sums the ranks' terms."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, sharding: Sharding) -> Tensor:
        ctx.sharding = sharding
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (total,) = _sum_terms([(gradient, ctx.sharding)], ctx.sharding.mesh)
        return total, None
