"""Which ranks of a layout talk to each other, in the order of `weft.launch.topology`: tensor innermost."""

from weft.launch.plan.cluster import Cluster
from weft.launch.plan.collectives import Group
from weft.launch.plan.layout import Layout


def tensor_group(layout: Layout, cluster: Cluster) -> Group:
    return Group(layout.tensor, 1, cluster.devices_per_node)


def context_group(layout: Layout, cluster: Cluster) -> Group:
    return Group(layout.context, layout.tensor, cluster.devices_per_node)


def expert_group(layout: Layout, cluster: Cluster) -> Group:
    """Experts are spread over neighbouring data (and context) ranks."""
    return Group(layout.expert, layout.tensor, cluster.devices_per_node)


def data_group(layout: Layout, cluster: Cluster) -> Group:
    """Ranks that hold the same parameters: data and context together."""
    return Group(layout.data * layout.context, layout.tensor, cluster.devices_per_node)


def stage_distance(layout: Layout) -> int:
    """Ranks between two neighbouring pipeline ranks."""
    return layout.data * layout.context * layout.tensor
