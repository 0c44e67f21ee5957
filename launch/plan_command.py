"""`weft plan CONFIG`: which layout, will it fit, how fast, before anything is launched."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from weft.launch.errors import UserError
from weft.launch.plan.ask import cluster_of, devices_of, layout_as_set, settings_with, space_of
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.report import nowhere_text, plan_json, plan_text
from weft.launch.plan.search import Candidate, Plan, Planner
from weft.launch.plan.uneven import Troubles
from weft.launch.plan.uneven_report import read_troubles, uneven_json, uneven_layouts, uneven_text
from weft.launch.sections import Settings
from weft.launch.settings import check_layout, dump_settings, load_settings


@click.command(epilog="Example:  weft plan configs/demo.yaml cluster.device=h100-sxm cluster.nodes=2 --top 5")
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Layouts to show.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the settings with the best layout in them.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures of the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, times in seconds.")
@click.option(
    "--slow-node",
    multiple=True,
    metavar="NODE=FACTOR",
    help="What if a node computed FACTOR times longer? Nodes count from 0; may be given several times.",
)
@click.option(
    "--lost-link",
    multiple=True,
    metavar="NODE[=COUNT]",
    help="What if a node lost COUNT (1) of its links to the network, one for each device?",
)
@click.option("--validate", type=click.Path(path_type=Path), help="Judge the planner on a CSV file of published runs.")
def plan_command(
    config: str | None,
    overrides: tuple[str, ...],
    top: int,
    write: Path | None,
    html: Path | None,
    as_json: bool,
    slow_node: tuple[str, ...],
    lost_link: tuple[str, ...],
    validate: Path | None,
) -> None:
    """Rank the layouts of a job: predicted memory, step time and utilisation, and why the others lose.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. The cluster is that of its section cluster,
    whose device is a name or a YAML file.
    """
    if validate is not None:
        if config is not None or write is not None or html is not None or slow_node or lost_link:
            raise UserError("--validate takes a CSV file alone; leave out CONFIG and the other options but --json.")
        _validate(validate, as_json)
        return
    if config is None:
        raise UserError("weft plan needs a settings file; for example: weft plan configs/demo.yaml.")
    settings = load_settings(config, overrides)
    cluster = cluster_of(settings)
    troubles = _troubles(settings, cluster, slow_node, lost_link)
    _plan(settings, cluster, troubles, top=top, write=write, html=html, as_json=as_json)


def _troubles(settings: Settings, cluster: Cluster, slow: Sequence[str], lost: Sequence[str]) -> Troubles:
    if not slow and not lost:
        return Troubles()
    devices = devices_of(settings, cluster)
    if settings.cluster.device in ("auto", "cpu") or cluster.processors is not None:
        option = "--slow-node" if slow else "--lost-link"
        raise UserError(
            f"{option} asks about nodes of a cluster, but cluster.device is {settings.cluster.device}, one machine "
            "whose cores are shared; name a device such as h100-sxm, and cluster.nodes."
        )
    per_node = cluster.devices_per_node
    return read_troubles(slow, lost, -(-devices // per_node), per_node)


def _plan(
    settings: Settings,
    cluster: Cluster,
    troubles: Troubles,
    *,
    top: int,
    write: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    space = space_of(settings, cluster)
    planner = Planner(space, cluster)
    plan = planner.search()
    _check_found(plan)
    own = layout_as_set(settings, space)
    as_set = None if own is None else planner.price(own, simulate=True)
    uneven = uneven_layouts(plan, troubles, top, as_set) if troubles else []
    if as_json:
        found = plan_json(plan, planner, top, as_set)
        click.echo(json.dumps(found | {"uneven": uneven_json(uneven)} if troubles else found, indent=2))
    else:
        width, colour = shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty()
        click.echo(plan_text(plan, planner, top, as_set, width=width, colour=colour))
        if troubles:
            click.echo(f"\n{uneven_text(plan, troubles, uneven)}")
    if html is not None:
        _write_page(html, settings, plan, planner, top, as_set)
    if write is not None:
        _write(settings_with(settings, plan.best.layout), plan, write)


def _check_found(plan: Plan) -> None:
    space = plan.space
    if not plan.considered:
        raise UserError(
            f"No layout divides batch.global_size {space.job.global_batch} and the model's {space.shape.heads} heads "
            f"and {space.shape.layers} layers over {space.devices} devices; choose a batch of a multiple of them, or "
            "another number of devices."
        )
    if not plan.fitting:
        raise UserError(nowhere_text(plan))


def _write_page(
    path: Path, settings: Settings, plan: Plan, planner: Planner, top: int, as_set: Candidate | None
) -> None:
    from weft.launch.plan.page import write_page

    try:
        write_page(path, plan, planner, name=settings.name, top=top, as_set=as_set)
    except OSError as error:
        raise UserError(f"--html {path} cannot be written ({error.strerror}); choose another path.") from error
    click.echo(f"wrote {path}", err=True)


def _write(settings: Settings, plan: Plan, path: Path) -> None:
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_text(dump_settings(settings), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"--write {path} cannot be written ({error.strerror}); choose another path.") from error
    click.echo(f"wrote {path}", err=True)
    try:
        check_layout(settings, plan.space.devices)
    except UserError as error:
        click.echo(f"{click.style('Warning:', fg='yellow')} {error}", err=True)


def _validate(path: Path, as_json: bool) -> None:
    from weft.launch.plan.validation.report import validation_json, validation_text
    from weft.launch.plan.validation.rows import read_rows

    rows = read_rows(path)
    click.echo(json.dumps(validation_json(rows), indent=2) if as_json else validation_text(rows))
