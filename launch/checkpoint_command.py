"""`weft checkpoint list|verify|inspect|reshard`: what is saved, whether it is whole, and another layout of it."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click

from weft.launch.errors import RunError, UserError
from weft.launch.saved_run import SavedRun, find_checkpoints, read_run
from weft.launch.units import bytes_text, count_text
from weft.parallel.checkpoint.errors import CheckpointError
from weft.parallel.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from weft.parallel.checkpoint.verify import problems_of

AXES = ("pipeline", "data", "context", "tensor")


@click.group(epilog="Example:  weft checkpoint verify runs/demo/checkpoints")
def checkpoint_command() -> None:
    """Look at checkpoints, check them, or write one in another layout."""


@checkpoint_command.command("list", epilog="Example:  weft checkpoint list runs/demo/checkpoints")
@click.argument("directory", type=click.Path(path_type=Path))
def list_command(directory: Path) -> None:
    """List the checkpoints of DIRECTORY, oldest first; files are not read."""
    rows = [("checkpoint", "step", "tokens", "size", "files", "layout")]
    for path in _checkpoints(directory):
        try:
            manifest, run = read_manifest(path), read_run(path)
        except CheckpointError:
            rows.append((path.name, "damaged", "", "", "", ""))
            continue
        size, files = bytes_text(manifest.bytes), str(len(manifest.files))
        rows.append((path.name, str(run.step), count_text(run.tokens), size, files, _layout(run)))
    click.echo(_table(rows))


@checkpoint_command.command("verify", epilog="Example:  weft checkpoint verify runs/demo/checkpoints")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def verify_command(paths: tuple[Path, ...]) -> None:
    """Read all of each checkpoint and compare it with its checksums.

    PATHS are checkpoints, or folders of them. Exit status 1 when one is damaged.
    """
    damaged = 0
    for path in chain.from_iterable(map(_checkpoints, paths)):
        problems = list(problems_of(path))
        damaged += bool(problems)
        click.echo("\n".join(problems) if problems else f"{path} is whole")
    if damaged:
        raise RunError(f"{damaged} damaged; weft train goes on from the newest that is whole.")


@checkpoint_command.command("inspect", epilog="Example:  weft checkpoint inspect runs/demo/checkpoints")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_text", is_flag=True, help="Print JSON instead of tables.")
def inspect_command(path: Path, as_text: bool) -> None:
    """Show the run, the files and the tensors of the checkpoint PATH, or of the newest in the folder PATH."""
    path = _checkpoints(path)[-1]
    try:
        manifest, run = read_manifest(path), read_run(path)
    except CheckpointError as error:
        raise UserError(f"{error}.") from None
    if as_text:
        click.echo(json.dumps({"metadata": manifest.metadata, "tensors": _tensors(manifest)}, indent=1))
        return
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    click.echo(f"step {run.step}, {run.samples} samples, {run.tokens} tokens, seed {run.seed}; {versions}")
    click.echo(f"{bytes_text(manifest.bytes)} in {len(manifest.files)} files, saved by {_layout(run)}\n")
    rows = [("tensor", "shape", "dtype", "size", "pieces")]
    for name, record in _tensors(manifest).items():
        shape = " × ".join(map(str, record["shape"])) or "scalar"
        rows.append((name, shape, record["dtype"], bytes_text(record["bytes"]), str(record["pieces"])))
    click.echo(_table(rows))


@checkpoint_command.command(
    "reshard", epilog="Example:  weft checkpoint reshard runs/demo/checkpoints resharded parallel.tensor=4"
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def reshard_command(source: Path, destination: Path, overrides: tuple[str, ...]) -> None:
    """Write the checkpoint SOURCE, or the newest in the folder SOURCE, as DESTINATION, in another layout.

    Each KEY=VALUE replaces one of the settings that SOURCE was saved with. Any layout loads any checkpoint; files that
    match the ranks are read in one go each.
    """
    from weft.launch.reshard import reshard

    read = reshard(_checkpoints(source)[-1], destination, overrides)
    click.echo(f"wrote {destination}, {bytes_text(read)}")


def _checkpoints(path: Path) -> Sequence[Path]:
    if (path / MANIFEST).exists():
        return [path]
    found = find_checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint; give a checkpoint, or a folder of checkpoints.")
    return found


def _layout(run: SavedRun) -> str:
    parallel = run.settings.get("parallel")
    if not isinstance(parallel, dict):
        return "an unknown layout"
    sizes = [(axis, parallel.get(axis)) for axis in AXES]
    return " × ".join(f"{axis} {size}" for axis, size in sizes if isinstance(size, int) and size > 1) or "one process"


def _tensors(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "shape": list(record.shape),
            "dtype": record.dtype,
            "bytes": sum(piece.bytes for piece in record.pieces),
            "pieces": len(record.pieces),
        }
        for name, record in manifest.tensors.items()
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
