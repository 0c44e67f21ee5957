"""`weft evaluate CHECKPOINT`: perplexity, bits per byte and tasks, in any layout."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from weft.launch.errors import UserError


@click.command(epilog="Example:  weft evaluate runs/demo --text README.md --json results.json parallel.pipeline=2")
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--text", "texts", metavar="FILE", multiple=True, help="Text for perplexity and bits per byte.")
@click.option("--task", "tasks", metavar="FILE", multiple=True, help="Questions as JSON lines, see docs.")
@click.option("--harness", metavar="NAMES", multiple=True, help="Tasks of lm-evaluation-harness, parted by commas.")
@click.option("--harness-folder", metavar="FOLDER", help="Where more tasks for the harness are described.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each of the harness's tasks at most.")
@click.option("--json", metavar="FILE", help="Where the results are written as JSON, too.")
@click.option("--window", type=click.IntRange(2), help="Tokens that the model sees; its positions unless given.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1), help="Of an answer.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Texts at a time, per replica.")
def evaluate_command(checkpoint: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Measure the model in CHECKPOINT: a run, one of its checkpoints, or a Hugging Face directory.

    Every number comes with its standard error.

    The numbers do not depend on the layout: KEY=VALUE sets one, such as parallel.tensor=2.
    """
    import json

    from weft.launch.evaluation.tasks import read_task
    from weft.launch.jobs import run_ranks
    from weft.launch.source import check_kind, open_source

    if not (options["texts"] or options["tasks"] or options["harness"]):
        raise UserError("nothing is to be measured; give --text FILE, --task FILE or --harness NAMES.")
    for file in options["texts"]:
        if not Path(file).is_file():
            raise UserError(f"--text {file} does not exist; give a text file.")
    for file in options["tasks"]:
        read_task(Path(file))
    if options["harness"] and find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-eval, which is not installed; pip install 'weft[evaluate]'.")
    source = open_source(checkpoint, overrides)
    check_kind(source)
    positions = source.config.max_position_embeddings
    if options["window"] and options["window"] > positions:
        raise UserError(f"--window is {options['window']}, but the model has {positions} positions; choose fewer.")
    arguments = [json.dumps(options), *overrides]
    run_ranks(
        "weft.launch.evaluation.main:main",
        checkpoint,
        arguments,
        ranks=source.ranks,
        timeout=source.settings.train.timeout,
    )
