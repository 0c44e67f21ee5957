"""`weft topology CONFIG`: which rank is which, as tables on the terminal."""

from collections.abc import Sequence

import click

from weft.launch.settings import load_settings
from weft.launch.topology import Topology, build_topology
from weft.launch.world import world_size

_SHOWN_RANKS = 64


@click.command(epilog="Example:  weft topology configs/demo.yaml parallel.tensor=4 cluster.devices_per_node=8")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--all", "show_all", is_flag=True, help=f"Show every rank, not only the first {_SHOWN_RANKS}.")
def topology_command(config: str, overrides: tuple[str, ...], show_all: bool) -> None:
    """Show which rank is which on every mesh axis, node and device.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. Warns when a tensor group crosses nodes.
    """
    settings = load_settings(config, overrides)
    topology = build_topology(settings, world_size(settings))
    shown = topology.world_size if show_all else min(topology.world_size, _SHOWN_RANKS)
    click.echo(_summary(topology))
    click.echo(_rank_table(topology, shown))
    click.echo(_group_table(topology, shown))
    if shown < topology.world_size:
        click.echo(f"\nThese are the first {shown} of {topology.world_size} ranks; --all shows every one.")
    for warning in topology.warnings():
        click.echo(f"\n{click.style('Warning:', fg='yellow')} {warning}")


def _summary(topology: Topology) -> str:
    nodes = topology.world_size // topology.ranks_per_node
    return (
        f"{topology.world_size} ranks = pipeline {topology.pipeline} × data {topology.data} × "
        f"context {topology.context} × tensor {topology.tensor}, on {nodes} × {topology.ranks_per_node} devices"
    )


def _rank_table(topology: Topology, shown: int) -> str:
    places = map(topology.place, range(shown))
    rows = [(p.rank, p.node, p.local_rank, p.pipeline, p.data, p.context, p.tensor) for p in places]
    return _table(("rank", "node", "device", "pipeline", "data", "context", "tensor"), rows)


def _group_table(topology: Topology, shown: int) -> str:
    """A block for each pipeline rank, in it a row for each tensor group."""
    rows: list[Sequence[object]] = []
    for first in range(0, shown, topology.tensor):
        place, last = topology.place(first), topology.place(first + topology.tensor - 1)
        if first and place.data == place.context == 0:
            rows.append(())
        nodes = _span(place.node, last.node)
        rows.append((place.pipeline, place.data, place.context, nodes, _span(place.rank, last.rank)))
    return _table(("pipeline", "data", "context", "node", "tensor group"), rows)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns below an empty line and the header."""
    cells = [header, *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells if row) for column in range(len(header))]
    lines = ["  ".join(value.rjust(width) for value, width in zip(row, widths, strict=False)) for row in cells]
    return "\n" + "\n".join(lines)
