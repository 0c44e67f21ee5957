"""One rank of `weft inspect`: all look, rank 0 writes the page."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weft.launch.inference import build_inference_mesh, load_placement
from weft.launch.source import Source, open_source
from weft.launch.vocabulary import Vocabulary, open_vocabulary
from weft.model.observe import Observation, observe

PAGE = "inspection.html"


def main(path: str, arguments: Sequence[str]) -> None:
    """Look as the options, JSON in `arguments[0]`, say.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    options, overrides = json.loads(arguments[0]), arguments[1:]
    source = open_source(path, overrides)
    vocabulary = open_vocabulary(source)
    tokens = vocabulary.encode(options["prompt"])
    try:
        found = observe(load_placement(source, build_inference_mesh(source)), tokens, options["top"])
    finally:
        dist.destroy_process_group()
    if found is not None:
        write_page(Path(options["output"]), source, vocabulary, tokens, found)
        print(f"{options['output']}: the mean loss is {float(found.losses.mean()):.4f} nats per token", flush=True)


def write_page(file: Path, source: Source, vocabulary: Vocabulary, tokens: list[int], found: Observation) -> None:
    """Write the page whole or not at all."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    content = page_data(source, vocabulary, tokens, found)
    page = environment.get_template(PAGE).render(name=source.settings.name, content=content)
    work = file.with_name(f".{file.name}.part")
    work.write_text(page, encoding="utf-8")
    work.replace(file)


def page_data(source: Source, vocabulary: Vocabulary, tokens: list[int], found: Observation) -> dict[str, Any]:
    """What the page shows, as JSON values; attention in 255ths, a byte each."""
    layers, heads = found.attention.shape[:2]
    shares = (found.attention * 255).round().to(torch.uint8)
    return {
        "checkpoint": str(source.path),
        "tokens": [vocabulary.name(token) for token in tokens],
        "losses": [round(loss, 4) for loss in found.losses.tolist()],
        "candidates": [
            [[vocabulary.name(token) for token in row] for row in layer] for layer in found.candidates.tolist()
        ],
        "probabilities": [
            [[round(share, 4) for share in row] for row in layer] for layer in found.probabilities.tolist()
        ],
        "layers": layers,
        "heads": heads,
        "attention": base64.b64encode(shares.numpy().tobytes()).decode(),
    }
