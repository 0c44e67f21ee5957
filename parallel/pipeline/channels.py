"""The process groups through which a pipeline's messages go.

gloo matches messages by pair, direction and tag, and a send waits for nothing but its own receive, so one group serves
for all; between ranks of one machine a link through shared memory does the same faster. NCCL runs what two ranks do in
one communicator one after the other: a send that is not taken yet would hold up the receive behind it. So there each
direction between two ranks is a lane with a communicator of its own.
"""

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.meeting import links_of


class Channels:
    """One group for everything.

    Attributes:
        control: the group of the pipeline for headers, losses and whatever else lies on the CPU.
        links: for tensors on the CPU, in place of that group, to those ranks that are on this machine.
        bounded: whether waiting for a data message can be given a time limit.
    """

    bounded = True

    def __init__(self, control: dist.ProcessGroup) -> None:
        self.control = control
        self.links = links_of(control)

    def open(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Make ready for data from the first to the second rank of each pair; called alike on every rank."""

    def lane(self, source: int, destination: int, peer: int) -> tuple[dist.ProcessGroup, int]:
        """The group for data between two ranks, of which `peer` is the other one, and that one's rank in it."""
        return self.control, peer


class Lanes(Channels):
    """A communicator for each direction between two ranks, and a gloo group for control.

    Making it and opening lanes are collective calls of the whole world, with the same pairs in every pipeline: all
    ranks make all groups of all pipelines in one order.
    """

    def __init__(self, mesh: DeviceMesh, backend: str, device: torch.device, timeout: float) -> None:
        self.bounded = backend != "nccl"
        self._backend = backend
        self._device = device
        self._timeout = timedelta(seconds=timeout)
        self._own = dist.get_process_group_ranks(mesh.get_group())
        self._pipelines = _all_pipelines(self._own, device)
        self._lanes: dict[tuple[int, int], dist.ProcessGroup] = {}
        groups = [dist.new_group(ranks, self._timeout, "gloo") for ranks in self._pipelines]
        super().__init__(groups[self._pipelines.index(self._own)])

    def open(self, pairs: Iterable[tuple[int, int]]) -> None:
        new = sorted(set(pairs) - self._lanes.keys())
        for ranks in self._pipelines:
            for source, destination in new:
                group = dist.new_group([ranks[source], ranks[destination]], self._timeout, self._backend)
                if ranks == self._own:
                    self._lanes[source, destination] = group
        for pair in new:
            self._connect(*pair)

    def lane(self, source: int, destination: int, peer: int) -> tuple[dist.ProcessGroup, int]:
        # a group numbers its members in the order of their ranks in the world, which is that of the pipeline
        return self._lanes[source, destination], int(peer == max(source, destination))

    def _connect(self, source: int, destination: int) -> None:
        """Send one number: a communicator is set up by its first message, and that waits for the other rank."""
        rank = dist.get_rank(self.control)
        number = torch.zeros(1, device=self._device)
        if rank == source:
            group, peer = self.lane(source, destination, destination)
            dist.send(number, group=group, group_dst=peer)
        elif rank == destination:
            group, peer = self.lane(source, destination, source)
            dist.recv(number, group=group, group_src=peer)


def open_channels(mesh: DeviceMesh, device: torch.device, timeout: float) -> Channels:
    """Lanes where tensors lie on GPUs, else the mesh's own group."""
    return Lanes(mesh, "nccl", device, timeout) if device.type == "cuda" else Channels(mesh.get_group())


def _all_pipelines(own: list[int], device: torch.device) -> list[list[int]]:
    """The ranks of every pipeline of the world, in one order on every rank."""
    mine = torch.tensor(own, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [list(ranks) for ranks in sorted({tuple(theirs.tolist()) for theirs in everyone})]
