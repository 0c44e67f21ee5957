"""Seconds of collectives: a latency per message and a time per byte (Hockney 1994), node by node.

A group that spans nodes works in two levels, as NCCL's rings and trees do: members of a node share the data over the
fast links, and each of them carries its part over the network on a way of its own. Bytes are those of the whole tensor:
what an all-gather ends with, a reduce-scatter begins with, and an all-reduce has at both ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

from weft.launch.plan.cluster import Cluster, Link


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: `size` of them, `stride` ranks apart, on nodes of `devices` devices."""

    size: int
    stride: int
    devices: int

    @property
    def members(self) -> int:
        """Members on one node."""
        return max(1, min(self.size, self.devices // self.stride))

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return ceil(self.size / self.members)


def all_gather_seconds(cluster: Cluster, group: Group, size: float) -> float:
    """All-gather, or reduce-scatter, of `size` bytes round a ring: each link passes all parts but one."""
    if group.size == 1 or size <= 0:
        return 0.0
    return cluster.collective_seconds + _levels(cluster, group, size, hops=lambda members: members - 1)


def all_reduce_seconds(cluster: Cluster, group: Group, size: float) -> float:
    """All-reduce: a reduce-scatter and an all-gather, or up and down a tree when that has fewer hops."""
    if group.size == 1 or size <= 0:
        return 0.0
    return cluster.collective_seconds + 2.0 * _levels(
        cluster, group, size, hops=lambda members: min(members - 1, ceil(log2(members)))
    )


def all_to_all_seconds(cluster: Cluster, group: Group, size: float) -> float:
    """All-to-all in which each rank sends `size` bytes, equally to all, over both kinds of links at once."""
    if group.size == 1 or size <= 0:
        return 0.0
    outside = 1 - group.members / group.size
    inside = (group.members - 1) / group.size
    steps = cluster.network.seconds if group.nodes > 1 else cluster.node.seconds
    sent = max(size * inside / cluster.node.rate, size * outside / cluster.network.rate)
    return cluster.collective_seconds + sent + steps


def send_seconds(cluster: Cluster, distance: int, size: float) -> float:
    """One message to the rank that is `distance` ranks away."""
    link = cluster.node if distance < cluster.devices_per_node else cluster.network
    return size / link.rate + link.seconds


def _levels(cluster: Cluster, group: Group, size: float, hops: Callable[[int], int]) -> float:
    """Inside the nodes and between them, one after the other."""
    inside = _pass(cluster.node, group.members, size, hops)
    return inside + _pass(cluster.network, group.nodes, size / group.members, hops)


def _pass(link: Link, members: int, size: float, hops: Callable[[int], int]) -> float:
    """Every member's part to all others of `members`."""
    if members == 1:
        return 0.0
    return size * (members - 1) / members / link.rate + hops(members) * link.seconds
