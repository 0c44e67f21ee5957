"""How many ranks a run has, and on what kind of device."""

from typing import Literal

from weft.launch.errors import UserError
from weft.launch.layout import model_ranks
from weft.launch.sections import Settings


def device_type(settings: Settings) -> Literal["cpu", "cuda"]:
    """The kind of device that the ranks of this machine compute on; any name but cpu and auto is a GPU's."""
    import torch

    if settings.cluster.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if settings.cluster.device == "cpu" else "cuda"


def gpus_here(settings: Settings) -> int:
    """GPUs of this machine, where the ranks compute on GPUs; otherwise 0."""
    import torch

    return torch.cuda.device_count() if device_type(settings) == "cuda" else 0


def world_size(settings: Settings, *, gpus_per_node: int = 0) -> int:
    """The ranks of a run: what the layout asks for, or every device of the cluster when `parallel.data` is auto.

    Args:
        gpus_per_node: GPUs of each node, where the ranks compute on GPUs and the settings do not say how many.

    Raises:
        UserError: the ranks do not spread equally over the nodes, or are more than the devices.
    """
    nodes = settings.cluster.nodes
    devices = gpus_per_node if settings.cluster.devices_per_node == "auto" else settings.cluster.devices_per_node
    if settings.parallel.data == "auto":
        ranks = nodes * devices or model_ranks(settings)
    else:
        ranks = model_ranks(settings) * settings.parallel.data
    if ranks % nodes:
        raise UserError(f"cluster.nodes is {nodes}, over which {ranks} ranks do not spread equally.")
    if devices and ranks > nodes * devices and settings.cluster.device != "cpu":
        raise UserError(
            f"parallel: the layout takes {ranks} ranks, but the cluster has {nodes} × {devices} devices "
            "(cluster.nodes × cluster.devices_per_node); choose a smaller layout, or cluster.device=cpu."
        )
    return ranks
