"""`weft inspect CHECKPOINT --prompt …`: what each layer would say, where each head looks, and each token's loss."""

from pathlib import Path
from typing import Any

import click

from weft.launch.errors import UserError


@click.command(epilog='Example:  weft inspect runs/demo --prompt "The for statement" --output inside.html')
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prompt", required=True, metavar="TEXT", help="The text that the model reads.")
@click.option("--output", default="inspect.html", show_default=True, metavar="FILE", help="The page that is written.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 50), help="Candidates of each layer.")
def inspect_command(checkpoint: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Look inside the model in CHECKPOINT while it reads a text; writes one self-contained HTML page.

    Per layer the likeliest next tokens (logit lens), per head the attention map, per token the loss. KEY=VALUE sets a
    layout, such as parallel.pipeline=2, which does not change what is seen.
    """
    import json

    from weft.launch.jobs import run_ranks
    from weft.launch.preflight import check_directory
    from weft.launch.source import check_kind, open_source
    from weft.launch.vocabulary import open_vocabulary

    source = open_source(checkpoint, overrides)
    check_kind(source)
    if source.settings.parallel.data != 1:
        raise UserError(
            f"parallel.data is {source.settings.parallel.data}; one text needs one replica, so leave it out."
        )
    tokens, positions = len(open_vocabulary(source).encode(options["prompt"])), source.config.max_position_embeddings
    if not 2 <= tokens <= positions:
        raise UserError(f"--prompt has {tokens} tokens; give from 2 to the model's {positions} positions.")
    check_directory("--output", str(Path(options["output"]).parent))
    arguments = [json.dumps(options), *overrides]
    run_ranks(
        "weft.launch.inspection:main", checkpoint, arguments, ranks=source.ranks, timeout=source.settings.train.timeout
    )
