"""`weft train CONFIG`: checks everything that can be checked, then starts the ranks."""

import os
from pathlib import Path

import click

from weft.launch.errors import StoppedError, UserError
from weft.launch.found_ranks import found_rank
from weft.launch.settings import Settings, load_settings
from weft.launch.world import gpus_here, world_size


@click.command(epilog="Example:  weft train configs/demo.yaml parallel.tensor=2 train.steps=100")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Build one rank without numbers; show what it would hold and send.")
@click.option("--rank", type=click.IntRange(min=0), default=0, help="The rank of a dry run (0 when left out).")
def train_command(config: str, overrides: tuple[str, ...], dry_run: bool, rank: int) -> None:
    """Train the model that CONFIG describes, one process per device.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. Ctrl-C saves and ends; the same command
    goes on from there. Inside torchrun, srun or Kubernetes the ranks that are there are taken.
    """
    if dry_run:
        _show_rank(config, overrides, rank)
        return
    found = found_rank(os.environ)
    if found is None:
        _start(config, overrides)
    else:
        os.environ.update(found)
        _join(config, overrides)


def _start(config: str, overrides: tuple[str, ...]) -> None:
    from weft.launch.preflight import check_port, check_run

    settings = load_settings(config, overrides)
    ranks = world_size(settings, gpus_per_node=gpus_here(settings))
    check_run(settings, ranks)
    _check_nodes(settings)
    if os.environ.get("NODE_RANK", "0") == "0":
        check_port(os.environ.get("MASTER_PORT", "0"))
    _launch(settings, ranks, config, overrides)


def _show_rank(config: str, overrides: tuple[str, ...], rank: int) -> None:
    from weft.launch.dry_run import dry_run, dry_run_text

    settings = load_settings(config, overrides)
    click.echo(dry_run_text(dry_run(settings, world_size(settings, gpus_per_node=gpus_here(settings)), rank)))


def _launch(settings: Settings, ranks: int, config: str, overrides: tuple[str, ...]) -> None:
    from weft.launch.launcher import Job, launch

    job = Job(
        target="weft.launch.train:main",
        config=config,
        overrides=overrides,
        ranks_per_node=ranks // settings.cluster.nodes,
        logs=Path(settings.report.directory) / "logs",
        nodes=settings.cluster.nodes,
        timeout=settings.train.timeout,
    )
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
