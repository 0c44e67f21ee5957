"""Starts the ranks of a benchmark on this machine."""

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Result = TypeVar("Result")


def on_ranks(ranks: int, function: Callable[..., Result], *arguments: object) -> dict[int, Result]:
    """Call the function of a module on so many processes, which meet at a free port; every rank's result."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="benchmark",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    results: dict[int, Result] = elastic_launch(config, function)(*arguments)
    return results
