"""`weft generate CHECKPOINT --prompt …`: text from a trained model, in any layout."""

from pathlib import Path
from typing import Any

import click

from weft.launch.errors import UserError


@click.command(
    epilog='Example:  weft generate runs/demo --prompt "The for statement" --max-tokens 64 parallel.tensor=2'
)
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--prompt", "prompts", metavar="TEXT", multiple=True, help="Text to go on from; may be given several times."
)
@click.option("--prompts", "file", metavar="FILE", help='JSON lines, each {"prompt": …}; answered in JSON lines.')
@click.option("--output", metavar="FILE", help="Where the JSON lines are written instead of on the terminal.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="New tokens of each text.")
@click.option("--temperature", default=1.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Draw among the k likeliest tokens; 0: among all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw among the likeliest that reach this probability.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens less likely than this times the likeliest.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: tokens come again less likely.")
@click.option("--seed", default=0, show_default=True, help="The n-th text, from 0, draws from seed + n.")
@click.option(
    "--stop", "stops", metavar="TEXT", multiple=True, help="Text that ends a text; may be given several times."
)
@click.option("--beams", default=1, show_default=True, type=click.IntRange(1), help="Search for the likeliest text.")
@click.option("--length-penalty", default=1.0, show_default=True, help="Of --beams: above 0, longer texts gain.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Texts at a time, per replica.")
def generate_command(checkpoint: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Go on from prompts with the model in CHECKPOINT: a run, one of its checkpoints, or a Hugging Face directory.

    An encoder-decoder, such as T5, answers them. The tokens are the same in every layout: KEY=VALUE sets one, such as
    parallel.tensor=2. One prompt is answered as it goes on; several are answered in order.
    """
    import json

    from weft.launch.jobs import run_ranks
    from weft.launch.prompts import read_prompts
    from weft.launch.source import check_kind, open_source

    if bool(options["prompts"]) == bool(options["file"]):
        raise UserError("there is no prompt, or --prompt and --prompts at once; give --prompt TEXT or --prompts FILE.")
    if options["file"]:
        read_prompts(Path(options["file"]))
    source = open_source(checkpoint, overrides)
    check_kind(source, apart=True)
    arguments = [json.dumps(options), *overrides]
    run_ranks(
        "weft.launch.generate:main", checkpoint, arguments, ranks=source.ranks, timeout=source.settings.train.timeout
    )
