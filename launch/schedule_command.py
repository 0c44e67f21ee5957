"""`weft schedule NAME`: draws a pipeline schedule, with its bubble and the activations that each rank holds."""

import shutil
import sys
from pathlib import Path

import click

from weft.launch.errors import UserError
from weft.parallel.pipeline.check import check_schedule
from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.draw import draw_timeline, timeline_text
from weft.parallel.pipeline.schedules import BUILDERS, build_schedule
from weft.parallel.pipeline.search import search_schedule, share_costs
from weft.parallel.pipeline.simulate import simulate_schedule
from weft.parallel.pipeline.table import Schedule, ScheduleError, without_collector
from weft.parallel.pipeline.text import read_schedule, write_schedule
from weft.parallel.pipeline.timeline import Timeline

AUTO = "auto"
_SUFFIXES = (".svg", ".png", ".json", ".csv")


@click.command(epilog="Example:  weft schedule zb-v --ranks 4 --microbatches 8 --output zb-v.svg")
@click.argument("name")
@click.option("--ranks", type=click.IntRange(min=1), help="Pipeline ranks.")
@click.option("--microbatches", type=click.IntRange(min=1), help="Microbatches per step.")
@click.option(
    "--stages-per-rank", type=click.IntRange(min=1), default=1, show_default=True, help="Stages of each rank."
)
@click.option(
    "--costs",
    default="1,1,1,0",
    show_default=True,
    metavar="F,B,W,SEND",
    help="Time of a forward, an input gradient, a weight gradient and a send.",
)
@click.option(
    "--activations", type=click.FloatRange(min=1), help="For auto: microbatches that fit into a rank's memory."
)
@click.option("--output", help="Write a picture (.svg, .png), a Perfetto trace (.json) or the table (.csv).")
@without_collector()
def schedule_command(
    name: str,
    ranks: int | None,
    microbatches: int | None,
    stages_per_rank: int,
    costs: str,
    activations: float | None,
    output: str | None,
) -> None:
    """Prove a pipeline schedule, time it and draw it.

    NAME is one of the built-in schedules, a CSV file with one row per rank and one action per cell, such as 2F0 for
    the forward of microbatch 0 on stage 2, or auto, which searches for the shortest.
    """
    _check_output(output)
    parsed = _parse_costs(costs)
    try:
        if name == AUTO:
            schedule, parsed = _search(ranks, microbatches, parsed, activations)
        else:
            schedule = _load(name, ranks, microbatches, stages_per_rank)
        check_schedule(schedule)
        timeline = simulate_schedule(schedule, parsed)
    except ScheduleError as error:
        raise UserError(str(error)) from error
    title = f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} microbatches"
    if output is None:
        colour = sys.stdout.isatty()
        click.echo(
            timeline_text(timeline, title=title, width=shutil.get_terminal_size((120, 24)).columns, colour=colour)
        )
    else:
        _write(schedule, timeline, Path(output), title)
        click.echo(f"wrote {output}")


def _search(
    ranks: int | None, microbatches: int | None, costs: ScheduleCosts, activations: float | None
) -> tuple[Schedule, ScheduleCosts]:
    """The shortest schedule, and the costs of each of its stages, of which a rank may have several."""
    if ranks is None or microbatches is None:
        raise UserError(
            f"{AUTO} needs --ranks and --microbatches; for example: weft schedule {AUTO} --ranks 4 --microbatches 8"
        )
    found = search_schedule(ranks, microbatches, costs, activations=activations)
    above = 100 * (found.makespan / found.lower_bound - 1)
    click.echo(
        f"best: {found.schedule.name}, {found.stages_per_rank} stages per rank, length {found.makespan:g}, at most "
        f"{above:.1f} % above the best possible, {found.peak_activations:g} activations",
        err=True,
    )
    return found.schedule, share_costs(costs, found.stages_per_rank)


def _load(name: str, ranks: int | None, microbatches: int | None, stages_per_rank: int) -> Schedule:
    if name.endswith(".csv"):
        if ranks is not None or microbatches is not None:
            raise UserError(f"{name} fixes ranks and microbatches itself; leave out --ranks and --microbatches")
        try:
            return read_schedule(name)
        except OSError as error:
            raise UserError(
                f"{name} cannot be read ({error.strerror}); give a CSV file or a schedule's name"
            ) from error
    if name in BUILDERS and (ranks is None or microbatches is None):
        missing = "--ranks" if ranks is None else "--microbatches"
        raise UserError(
            f"schedule {name} needs {missing}; for example: weft schedule {name} --ranks 4 --microbatches 8"
        )
    return build_schedule(name, ranks or 1, microbatches or 1, stages_per_rank)


def _parse_costs(text: str) -> ScheduleCosts:
    try:
        forward, input_gradient, weight_gradient, send = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--costs is {text!r}; give four numbers F,B,W,SEND, such as 1,1,1,0.1") from None
    if min(forward, input_gradient, weight_gradient, send) < 0 or forward + input_gradient + weight_gradient <= 0:
        raise UserError(f"--costs is {text!r}; no cost may be negative, and one of F, B and W must be above 0")
    return ScheduleCosts(forward, input_gradient, weight_gradient, send)


def _check_output(output: str | None) -> None:
    if output is not None and Path(output).suffix not in _SUFFIXES:
        raise UserError(f"--output {output} has none of the known endings; choose one of {', '.join(_SUFFIXES)}")


def _write(schedule: Schedule, timeline: Timeline, path: Path, title: str) -> None:
    try:
        if path.suffix == ".csv":
            write_schedule(schedule, path)
        else:
            draw_timeline(timeline, path, title=title)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}); choose another path") from error
