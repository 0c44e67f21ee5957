"""`weft train CONFIG`: checks everything that can be checked, then starts the ranks."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weft.launch.errors import StoppedError, UserError
from weft.launch.found_ranks import found_rank
from weft.launch.settings import Settings, load_settings
from weft.launch.world import gpus_here, world_size

if TYPE_CHECKING:
    from weft.launch.launcher import Job


@click.command(epilog="Example:  weft train configs/demo.yaml parallel.tensor=2 train.steps=100")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help="After a failure start the ranks again from the newest checkpoint, up to N times (default 0; 3 with --nnodes "
    "MIN:MAX).",
)
@click.option("--nnodes", metavar="MIN:MAX", help="Begin, and go on after a failure, with MIN to MAX nodes.")
@click.option("--dry-run", is_flag=True, help="Build one rank without numbers; show what it would hold and send.")
@click.option("--rank", type=click.IntRange(min=0), default=0, help="The rank of a dry run (0 when left out).")
def train_command(
    config: str,
    overrides: tuple[str, ...],
    max_restarts: int | None,
    nnodes: str | None,
    dry_run: bool,
    rank: int,
) -> None:
    """Train the model that CONFIG describes, one process per device.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. Ctrl-C saves and ends; the same command
    goes on from there. Inside torchrun, srun or Kubernetes the ranks that are there are taken.
    """
    if dry_run:
        _show_rank(config, overrides, rank)
        return
    found = found_rank(os.environ)
    if found is None:
        _start(config, overrides, max_restarts=max_restarts, nnodes=nnodes)
    else:
        _refuse_options(max_restarts, nnodes)
        os.environ.update(found)
        _join(config, overrides)


def _start(config: str, overrides: tuple[str, ...], *, max_restarts: int | None, nnodes: str | None) -> None:
    from weft.launch.launcher import Job
    from weft.launch.preflight import check_port, check_restarts, check_run

    if nnodes is not None:
        overrides = (*overrides, f"cluster.nodes={_nodes(nnodes)[1]}")
    settings = load_settings(config, overrides)
    nodes = settings.cluster.nodes
    fewest = _nodes(nnodes)[0] if nnodes is not None else nodes
    restarts = (3 if fewest < nodes else 0) if max_restarts is None else max_restarts
    ranks = world_size(settings, gpus_per_node=gpus_here(settings))
    check_run(settings, ranks)
    _check_nodes(settings)
    check_restarts(settings, restarts, ranks=ranks // nodes * fewest, nodes=fewest)
    if os.environ.get("NODE_RANK", "0") == "0":
        check_port(os.environ.get("MASTER_PORT", "0"))
    job = Job(
        target="weft.launch.train:main",
        config=config,
        overrides=overrides,
        ranks_per_node=ranks // nodes,
        logs=Path(settings.report.directory) / "logs",
        nodes=nodes,
        fewest_nodes=fewest,
        timeout=settings.train.timeout,
        stop_timeout=settings.train.stop_timeout,
        max_restarts=restarts,
    )
    _launch(job, settings)


def _show_rank(config: str, overrides: tuple[str, ...], rank: int) -> None:
    from weft.launch.dry_run import dry_run, dry_run_text

    settings = load_settings(config, overrides)
    click.echo(dry_run_text(dry_run(settings, world_size(settings, gpus_per_node=gpus_here(settings)), rank)))


def _nodes(nnodes: str) -> tuple[int, int]:
    """The fewest and the most nodes of `MIN:MAX`, or of one number."""
    parts = nnodes.split(":")
    sensible = len(parts) <= 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[-1])
    if not sensible:
        raise UserError(f"--nnodes is {nnodes}, but takes a number of nodes, or the fewest and the most as in 1:2.")
    return int(parts[0]), int(parts[-1])


def _refuse_options(max_restarts: int | None, nnodes: str | None) -> None:
    """What is started already is started again by who has started it."""
    given = [name for name, value in (("--max-restarts", max_restarts), ("--nnodes", nnodes)) if value is not None]
    if given:
        raise UserError(f"{given[0]} is given, but the ranks are started by somebody else; give it to torchrun.")


def _launch(job: "Job", settings: Settings) -> None:
    from weft.launch.launcher import launch

    try:
        launch(job)
    except StoppedError as stop:
        state = "after saving this step" if stop.clean else "before this step could be saved"
        stop.args = (f"{stop} {state}; the same command goes on from {settings.checkpoint.directory}.",)
        raise


def _join(config: str, overrides: tuple[str, ...]) -> None:
    """Be one of the ranks that somebody else has started; only rank 0 speaks of what is wrong with the settings."""
    from weft.launch.train import main

    try:
        main(config, overrides)
    except UserError as error:
        if os.environ["RANK"] == "0":
            raise
        raise SystemExit(error.exit_status) from None


def _check_nodes(settings: Settings) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if settings.cluster.nodes > 1 and missing:
        raise UserError(
            f"cluster.nodes is {settings.cluster.nodes}, but {' and '.join(missing)} are not set; set MASTER_ADDR and "
            "MASTER_PORT to a free port of the first node and NODE_RANK to 0, 1, … on each, or start it by srun."
        )
