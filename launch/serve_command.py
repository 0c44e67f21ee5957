"""`weft serve CHECKPOINT`: an OpenAI-compatible endpoint for a trained model, in any layout."""

from typing import Any

import click

from weft.launch.errors import UserError


@click.command(epilog="Example:  weft serve runs/demo --port 8000 parallel.tensor=2")
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--name", help="What clients call the model; the run's name unless given.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Texts computed at a time.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Texts that may wait; then 429.")
@click.option("--context", type=click.IntRange(2), help="Tokens of a text; the model's positions unless given.")
@click.option("--max-tokens", type=click.IntRange(1), help="New tokens of a text at most; the context unless given.")
def serve_command(checkpoint: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Serve the model in CHECKPOINT, a run, one of its checkpoints or a Hugging Face directory, with OpenAI's protocol.

    For trying and measuring a model on the layout that it was trained in. Clients must send the bearer token that the
    variable WEFT_API_KEY holds, if it is set. Ctrl-C ends it.
    """
    import json

    from weft.launch.jobs import run_ranks
    from weft.launch.source import check_kind, open_source
    from weft.launch.vocabulary import open_vocabulary

    source = open_source(checkpoint, overrides)
    check_kind(source)
    open_vocabulary(source)
    longest = source.config.longest_text
    if options["context"] and options["context"] > longest:
        raise UserError(f"--context is {options['context']}, but the model has {longest} positions; choose fewer.")
    _check_server(options["host"], options["port"])
    arguments = [json.dumps(options), *overrides]
    run_ranks(
        "weft.launch.serving.main:main",
        checkpoint,
        arguments,
        ranks=source.ranks,
        timeout=source.settings.train.timeout,
    )


def _check_server(host: str, port: int) -> None:
    try:
        from weft.launch.serving.main import open_socket
    except ImportError as error:
        raise UserError(f"weft serve needs {error.name}, which is not installed; pip install 'weft[serve]'.") from None
    try:
        open_socket(host, port).close()
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be used: {error.strerror}; choose others.") from None
