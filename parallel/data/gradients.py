"""The gradient norm over all axes, each parameter counted once, and clipping by it."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.exchange import start_all_reduce
from weft.parallel.sharding import Sharding, sharded_parameters


def counted_parameters(
    modules: Iterable[nn.Module], tensor: DeviceMesh, elsewhere: Collection[nn.Parameter] = ()
) -> list[nn.Parameter]:
    """The parameters whose gradients this rank adds to the norm, so that over all ranks each counts once.

    A shard counts where it lies; of replicas over the `tensor` axis, the first rank's counts. `elsewhere`: parameters
    that another pipeline stage counts, such as the second copy of a tied embedding.
    """
    skipped = {id(parameter) for parameter in elsewhere}
    return [
        parameter
        for module in modules
        for _, parameter, sharding in sharded_parameters(module)
        if id(parameter) not in skipped and counts_here(sharding, tensor)
    ]


def gradient_norm(parameters: Sequence[nn.Parameter], axes: Sequence[DeviceMesh]) -> Tensor:
    """L2 norm of the gradient of the whole model, a float64 scalar, the same on every rank.

    `parameters`: those that this rank counts. `axes`: those over which the model is split (pipeline and tensor).
    Communication: one all-reduce of one number per axis.
    """
    return total_norm([parameter.grad for parameter in parameters if parameter.grad is not None], axes)


def total_norm(gradients: Sequence[Tensor], axes: Sequence[DeviceMesh]) -> Tensor:
    """L2 norm of all gradients of all ranks of the axes together, a float64 scalar, the same on every rank."""
    device = gradients[0].device if gradients else torch.device(axes[0].device_type)
    return norms(gradients, torch.zeros(len(gradients), dtype=torch.int64, device=device), 1, axes).squeeze(0)


def norms(
    gradients: Sequence[Tensor],
    labels: Tensor,
    count: int,
    axes: Sequence[DeviceMesh],
    *,
    spoiled: bool = False,
) -> Tensor:
    """L2 norms of the gradients of each label of `count`, over all ranks of the axes, float64 `[count]`.

    `labels`: int64 `[gradients]`, on the device of the axes, where the gradients need not be.
    `spoiled`, on one rank, makes them not a number on all.
    Communication: one all-reduce of `count` numbers per axis.
    """
    squares = torch.full((count,), torch.nan if spoiled else 0.0, dtype=torch.float64, device=labels.device)
    if gradients:
        own = torch.stack(torch._foreach_norm(list(gradients))).double().square()
        squares.index_add_(0, labels, own.to(labels.device))
    for axis in axes:
        if axis.size() > 1:
            squares = start_all_reduce(squares, axis, overwrite=True).wait()
    return squares.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale the gradients of all this rank's parameters so that the model's `norm` is at most `largest`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_max(1.0).to(gradients[0].dtype))


def counts_here(sharding: Sharding | None, tensor: DeviceMesh) -> bool:
    """Whether a parameter's gradient counts on this rank of the `tensor` axis, on which others may hold the same."""
    if sharding is None or sharding.dim is None:
        return tensor.get_local_rank() == 0
    return sharding.mesh.get_local_rank() % sharding.replicas == 0
