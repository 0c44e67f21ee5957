"""`weft verify`: whether every layout trains the model that one process trains, and where one does not."""

from typing import TYPE_CHECKING

import click

from weft.launch.errors import UserError
from weft.launch.settings import Settings, load_settings
from weft.launch.verify.layout import Choice

if TYPE_CHECKING:
    from weft.launch.verify.subject import Subject


@click.command(epilog="Examples:  weft verify configs/demo.yaml  or  weft verify --model my.module:build --processes 2")
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", metavar="MODULE:FUNCTION", help="Verify your own model: FUNCTION(mesh) builds it.")
@click.option("--processes", default=4, show_default=True, help="Verify every layout of up to this many processes.")
@click.option("--steps", default=3, show_default=True, help="Optimiser steps of each run.")
@click.option("--sequence", default=32, show_default=True, help="Tokens per sequence, at least.")
@click.option("--layouts", multiple=True, metavar="NAME=VALUE,...", help="Only these, such as tensor=2,schedule=gpipe.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds that one layout may take.")
@click.option("--json", "as_text", is_flag=True, help="Print JSON instead of the table.")
def verify_command(
    config: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    processes: int,
    steps: int,
    sequence: int,
    layouts: tuple[str, ...],
    timeout: float,
    as_text: bool,
) -> int:
    """Train a model a few steps in one process and in every layout, and compare.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. Exit status 1 when a layout differs by more
    than rounding; then the first wrong layer and the likely cause are named.
    """
    if (config is None) == (model is None):
        raise UserError("Give a settings file or --model package.module:build, and not both; weft verify -h explains.")
    for name, value, least in (("processes", processes, 2), ("steps", steps, 1), ("sequence", sequence, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}; give at least {least}.")
    choice = Choice(layouts)
    settings = None if config is None else load_settings(config, overrides)  # before torch, which takes a second

    from rich.console import Console

    from weft.launch.verify.pool import Pool
    from weft.launch.verify.report import as_json, print_report
    from weft.launch.verify.session import verify

    console = Console(stderr=as_text)
    with console.status(f"starting {processes} processes") as status, Pool(processes, timeout=timeout) as pool:
        subject = _subject(settings, model, processes=processes, steps=steps, sequence=sequence)
        report = verify(subject, pool, choice, watch=status.update)
    if as_text:
        click.echo(as_json(report))
    else:
        print_report(report, console)
    return 1 if report.wrong else 0


def _subject(settings: Settings | None, model: str | None, *, processes: int, steps: int, sequence: int) -> "Subject":
    if settings is not None:
        from weft.launch.verify.config_model import ConfigModel, shrunk

        return ConfigModel(settings, shrunk(settings, sequence=sequence, processes=processes), steps)
    from weft.launch.verify.find_model import find_model

    return find_model(model or "", steps=steps, rows=max(4, processes), sequence=sequence)
