"""Parameters that several stages hold, such as tied embeddings: kept equal, their gradients summed over the holders."""

import json
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.parallel.pipeline.stage import PipelineStage
from weft.parallel.pipeline.transport import SHARED, Transport


class SharedParameters:
    """The shared parameters of this rank's stages, and the ranks that hold the same ones.

    Making one is a collective call of the pipeline group: it finds the holders, unless they are given by the name of
    the parameter, and gives every copy the value that the holder of lowest rank has.

    Raises:
        ValueError: two stages share a parameter under one name but in different shapes.
    """

    def __init__(
        self,
        stages: Iterable[PipelineStage],
        transport: Transport,
        holders: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._transport = transport
        self._copies: dict[str, list[nn.Parameter]] = {}
        for stage in stages:
            for key, parameter in stage.shared.items():
                copies = self._copies.setdefault(key, [])
                if not any(parameter is copy for copy in copies):
                    copies.append(parameter)
        self._holders = self._find_holders() if holders is None else holders
        groups = self._holders.values()
        transport.channels.open((a, b) for holders in groups for a in holders for b in holders if a != b)
        self._make_equal()

    def begin_step(self) -> None:
        """Leave what earlier steps have summed with one holder only, so that the next sum counts it once."""
        for key, copies in self._copies.items():
            first = self._holders[key][0] == self._transport.rank
            for copy in copies[1:] if first else copies:
                if copy.grad is not None:
                    copy.grad.zero_()

    def sum_gradients(self, given: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        """Add up the gradients of all holders, or those given, in place, in the same order on every rank."""
        for key in sorted(self._copies):
            gradients = self._own_gradients(key) if given is None else given[key]
            for other in gradients[1:]:
                gradients[0].add_(other)
            parts = self._exchange(key, gradients[0])
            total = parts[0].clone()
            for part in parts[1:]:
                total.add_(part)
            for gradient in gradients:
                gradient.copy_(total)

    def _own_gradients(self, key: str) -> list[Tensor]:
        copies = self._copies[key]
        for copy in copies:
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in copies if copy.grad is not None]

    def _exchange(self, key: str, own: Tensor) -> list[Tensor]:
        """Every holder's tensor, in the order of ranks."""
        transport = self._transport
        peers = [rank for rank in self._holders[key] if rank != transport.rank]

        def what() -> str:
            return f"the gradient of the shared parameter {key} was not exchanged"

        received = {peer: torch.empty_like(own, memory_format=torch.contiguous_format) for peer in peers}
        works = [(transport.receive(tensor, peer, SHARED, what), peer) for peer, tensor in received.items()]
        message = own.detach().contiguous()
        works += [(transport.send(message, peer, SHARED, what), peer) for peer in peers]
        for work, peer in works:
            transport.wait(work, peer, what)
        received[transport.rank] = own
        return [received[rank] for rank in self._holders[key]]

    def _make_equal(self) -> None:
        for key, copies in sorted(self._copies.items()):
            with torch.no_grad():
                first = self._exchange(key, copies[0])[0]
                for copy in copies:
                    copy.copy_(first)

    def _find_holders(self) -> Mapping[str, Sequence[int]]:
        shapes = {key: list(copies[0].shape) for key, copies in self._copies.items()}
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(_gather(shapes, self._transport)):
            for key, shape in theirs.items():
                holders.setdefault(key, []).append(rank)
                if key in shapes and shape != shapes[key]:
                    raise ValueError(
                        f"the shared parameter {key} has shape {shapes[key]} here but {shape} on "
                        f"{self._transport.name_rank(rank)}; every holder needs the same shape"
                    )
        return holders


def _gather(shapes: dict[str, list[int]], transport: Transport) -> list[dict[str, list[int]]]:
    """The `shapes` of every rank of the pipeline."""
    group = transport.group
    content = torch.frombuffer(bytearray(json.dumps(shapes).encode()), dtype=torch.uint8)
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
    lengths[transport.rank] = content.numel()
    dist.all_reduce(lengths, group=group)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
    padded[: content.numel()] = content
    everyone = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded, group=group)
    return [
        json.loads(theirs[:length].numpy().tobytes() or b"{}")
        for theirs, length in zip(everyone, lengths.tolist(), strict=True)
    ]
