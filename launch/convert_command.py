"""`weft convert SOURCE DESTINATION`: a Hugging Face directory into a checkpoint, or back, by what SOURCE is."""

from pathlib import Path
from typing import Any

import click

from weft.launch.errors import RunError, UserError


@click.command(epilog="Example:  weft convert runs/finetune my-model --dtype bfloat16")
@click.argument("source")
@click.argument("destination")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the weights in a Hugging Face directory; as they are when left out.",
)
@click.option(
    "--shard-gigabytes",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Largest file of weights in a Hugging Face directory.",
)
def convert_command(source: str, destination: str, dtype: str | None, shard_gigabytes: float) -> None:
    """Write SOURCE as DESTINATION, in the other format, its weights bit for bit.

    SOURCE is a Hugging Face directory (config.json and safetensors), which becomes a checkpoint; or a run or one of its
    checkpoints, which becomes a Hugging Face directory with config, tokenizer and generation config.
    """
    goal = Path(destination)
    if goal.exists():
        raise UserError(f"{destination} is there already; choose another destination, or remove it first.")
    if not Path(source).is_dir():
        raise UserError(f"{source} is no folder; give a Hugging Face directory, a run or a checkpoint.")
    try:
        if _is_hugging_face(Path(source)):
            _import(source, goal, dtype)
        else:
            _export(source, goal, dtype, shard_gigabytes)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    except OSError as error:
        raise RunError(f"{destination} cannot be written: {error.strerror or error}; free space.") from None


def _is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def _import(source: str, goal: Path, dtype: str | None) -> None:
    from weft.launch.convert import to_checkpoint
    from weft.launch.settings import build_settings, model_of_directory

    if dtype is not None:
        raise UserError("--dtype is for Hugging Face directories; a checkpoint keeps the weights as they are.")
    values: dict[str, Any] = {"name": goal.name or "model", "model": model_of_directory(source)}
    settings = build_settings(values).model_dump(mode="json")
    left_out = to_checkpoint(Path(source), settings, goal)
    if left_out:
        click.echo(f"left out, because the model has no place for them: {', '.join(left_out)}", err=True)
    click.echo(f"{goal}: a checkpoint; weft generate {goal} --prompt … writes with it")


def _export(source: str, goal: Path, dtype: str | None, shard_gigabytes: float) -> None:
    import torch

    from weft.launch.convert import to_hugging_face
    from weft.launch.source import open_source

    to_hugging_face(
        open_source(source),
        goal,
        dtype=getattr(torch, dtype) if dtype is not None else None,
        shard_bytes=int(shard_gigabytes * 10**9),
    )
    click.echo(f"{goal}: a Hugging Face directory; AutoModelForCausalLM.from_pretrained({str(goal)!r}) reads it")
