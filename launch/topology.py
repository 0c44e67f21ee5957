"""Which rank is which: its place on every mesh axis and on the machines.

    rank = ((pipeline * data_size + data) * context_size + context) * tensor_size + tensor

Tensor ranks talk most and are neighbours; pipeline ranks talk least and are farthest apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from weft.launch.layout import data_size
from weft.launch.sections import Settings


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands: on which node and device, and at which coordinate of each mesh axis."""

    rank: int
    node: int
    local_rank: int
    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """A world of ranks spread over the mesh axes and equally over nodes.

    Attributes:
        ranks_per_node: ranks that each node holds.
        devices_per_node: devices that each node has; as many or more.
    """

    pipeline: int
    data: int
    context: int
    tensor: int
    ranks_per_node: int
    devices_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pipeline * self.data * self.context * self.tensor

    def place(self, rank: int) -> RankPlace:
        """Where `rank` stands."""
        outer, tensor = divmod(rank, self.tensor)
        outer, context = divmod(outer, self.context)
        pipeline, data = divmod(outer, self.data)
        node, local_rank = divmod(rank, self.ranks_per_node)
        return RankPlace(rank, node, local_rank, pipeline, data, context, tensor)

    def warnings(self) -> Iterator[str]:
        """One sentence for each thing about the machines that makes this topology slow or wasteful."""
        groups = [range(first, first + self.tensor) for first in range(0, self.world_size, self.tensor)]
        crossing = [group for group in groups if self.place(group[0]).node != self.place(group[-1]).node]
        if crossing:
            yield self._crossing_sentence(crossing, len(groups))
        idle = self.devices_per_node - self.ranks_per_node
        if idle > 0:
            yield (
                f"Each node leaves {idle} of its {self.devices_per_node} devices idle; "
                "a larger parallel.data (or auto) would use them."
            )

    def _crossing_sentence(self, crossing: list[range], groups: int) -> str:
        first = crossing[0]
        nodes = f"{self.place(first[0]).node} to {self.place(first[-1]).node}"
        fitting = max(size for size in range(1, self.ranks_per_node + 1) if self._fits_node(size))
        return (
            f"{len(crossing)} of {groups} tensor groups cross nodes, first ranks {first[0]} to {first[-1]} on nodes "
            f"{nodes}: every layer then waits for the network several times; choose parallel.tensor={fitting}, "
            "or the largest that divides the ranks of a node."
        )

    def _fits_node(self, tensor: int) -> bool:
        return self.ranks_per_node % tensor == 0 and self.tensor % tensor == 0


def build_topology(settings: Settings, world_size: int) -> Topology:
    """The topology of a run of `world_size` ranks, spread equally over the nodes.

    Raises:
        UserError: the layout does not fill the world exactly.
    """
    parallel, cluster = settings.parallel, settings.cluster
    ranks_per_node = world_size // cluster.nodes
    devices = ranks_per_node if cluster.devices_per_node == "auto" else cluster.devices_per_node
    return Topology(
        pipeline=parallel.pipeline,
        data=data_size(settings, world_size),
        context=parallel.context,
        tensor=parallel.tensor,
        ranks_per_node=ranks_per_node,
        devices_per_node=devices,
    )
