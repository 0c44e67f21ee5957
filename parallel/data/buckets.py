"""Replicas: gradients summed over the data axis in buckets, while the last backward still runs.

Li et al. 2020 (PyTorch Distributed), §3.2: parameters are put into buckets in the reverse of their order, which is
about the order in which their gradients become ready; a full bucket starts its all-reduce at once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.deferred import gradient_dtype
from weft.parallel.exchange import Pending, start_all_reduce

BUCKET_BYTES = 25 * 2**20


class GradientBuckets:
    """Sums the gradients of `parameters` over the ranks of `mesh`, the data axis.

    Every parameter's `.grad` becomes, and stays, a view into its bucket: accumulation over microbatches is local and
    one message carries many gradients. Per optimiser step: `zero()`, the backward passes, `arm()` before the last one,
    `finish()` after it. Gradients are summed, not averaged: the loss is already divided by what the whole batch counts.

    `late`: parameters whose gradients are complete only after the last backward, such as those tied to another stage;
    they are reduced in `finish()`.

    Communication: one all-reduce per bucket and step. On a group of one: none.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        mesh: DeviceMesh,
        *,
        late: Iterable[nn.Parameter] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.mesh = mesh
        self._armed = False
        postponed = {id(parameter) for parameter in late}
        trained = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        early = [p for p in reversed(trained) if id(p) not in postponed]
        groups = [*_by_size(early, bucket_bytes), *_by_size([p for p in trained if id(p) in postponed], bucket_bytes)]
        self.buckets = [Bucket(group) for group in groups]
        for bucket in self.buckets:
            bucket.early = id(bucket.parameters[0]) not in postponed
            for parameter in bucket.parameters:
                if bucket.early and mesh.size() > 1:
                    parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(p, bucket))  # type: ignore[misc]

    @property
    def bytes(self) -> int:
        """What all gradients take together, while they are there."""
        return sum(bucket.flat.nbytes for bucket in self.buckets)

    def zero(self) -> None:
        """Set all gradients to zero, in place."""
        for bucket in self.buckets:
            bucket.zero()

    def release(self) -> None:
        """Give the memory of all gradients away, until `zero` is called."""
        for bucket in self.buckets:
            bucket.release()

    def arm(self) -> None:
        """The next backward is the last of the step: reduce each bucket as soon as its gradients are complete."""
        self._armed = self.mesh.size() > 1
        for bucket in self.buckets:
            bucket.waiting_for = {id(parameter) for parameter in bucket.parameters}

    def finish(self) -> None:
        """Reduce what is not reduced yet and wait for everything.

        A gradient that is not computed in the backward itself (a deferred weight gradient) makes its bucket wait until
        here.
        """
        self._armed = False
        if self.mesh.size() == 1:
            return
        for bucket in self.buckets:
            bucket.start(self.mesh)
        for bucket in self.buckets:
            bucket.wait()

    def _ready(self, parameter: nn.Parameter, bucket: "Bucket") -> None:
        if not self._armed:
            return
        bucket.waiting_for.discard(id(parameter))
        if not bucket.waiting_for:
            bucket.start(self.mesh)


class Bucket:
    """Gradients of some parameters, of one precision and device, in one flat tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.flat = torch.zeros(
            sum(p.numel() for p in self.parameters), dtype=gradient_dtype(first), device=first.device
        )
        self.early = True
        self.waiting_for: set[int] = set()
        self._pending: Pending | None = None
        self.attach()

    def attach(self) -> None:
        """Make every parameter's `.grad` its view of the flat tensor."""
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.flat.untyped_storage().resize_(0)

    def zero(self) -> None:
        if not self.flat.untyped_storage().nbytes():
            self.flat.untyped_storage().resize_(self.flat.nbytes)
        self.flat.zero_()
        if any(parameter.grad is None for parameter in self.parameters):
            self.attach()

    def start(self, mesh: DeviceMesh) -> None:
        """Start the sum over the ranks, once per step."""
        if self._pending is None:
            self._pending = start_all_reduce(self.flat, mesh, overwrite=True)

    def wait(self) -> None:
        assert self._pending is not None
        total: Tensor = self._pending.wait()
        if total is not self.flat:
            self.flat.copy_(total)
        self._pending = None


def _by_size(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Neighbours whose gradients have one precision and device together, up to `limit` bytes; a larger one is alone."""
    groups: list[list[nn.Parameter]] = []
    kind, size = None, 0
    for parameter in parameters:
        precision = gradient_dtype(parameter)
        own_kind, own_size = (precision, parameter.device), parameter.numel() * precision.itemsize
        if own_kind != kind or size + own_size > limit:
            groups.append([])
            kind, size = own_kind, 0
        groups[-1].append(parameter)
        size += own_size
    return groups
