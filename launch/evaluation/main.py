"""One rank of `weft evaluate`: rank 0 asks, the others compute with it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from weft.launch.errors import UserError
from weft.launch.evaluation.perplexity import perplexity
from weft.launch.evaluation.results import Result, table
from weft.launch.evaluation.scores import Scorer
from weft.launch.evaluation.tasks import run_task
from weft.launch.inference import open_session
from weft.launch.source import open_source
from weft.launch.vocabulary import open_vocabulary


def main(path: str, arguments: Sequence[str]) -> None:
    """Evaluate as the options, JSON in `arguments[0]`, say.

    Raises:
        UserError: the checkpoint, a text or a task cannot be used.
    """
    options, overrides = json.loads(arguments[0]), arguments[1:]
    source = open_source(path, overrides)
    vocabulary = open_vocabulary(source)
    window = options["window"] or source.config.max_position_embeddings
    session = open_session(source, slots=options["batch"], capacity=window)
    try:
        if dist.get_rank() != 0:
            session.follow()
            return
        results = _measure(Scorer(session, vocabulary), options, window)
        session.close()
    except ValueError as error:
        raise UserError(f"{error}.") from None
    finally:
        dist.destroy_process_group()
    if options["json"]:
        records = [result.record() for result in results]
        written = {"checkpoint": str(source.path), "results": records}
        Path(options["json"]).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(results)}\n")
    sys.stdout.flush()


def _measure(scorer: Scorer, options: dict[str, Any], window: int) -> list[Result]:
    results: list[Result] = []
    for file in options["texts"]:
        results += perplexity(Path(file), scorer, window)
    for file in options["tasks"]:
        results += run_task(Path(file), scorer, options["max_tokens"])
    if options["harness"]:
        from weft.launch.evaluation.harness import run_harness

        folder = options["harness_folder"]
        wanted = [task for names in options["harness"] for task in names.split(",")]
        results += run_harness(wanted, Path(folder) if folder else None, scorer, options["limit"])
    return results
