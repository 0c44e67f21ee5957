"""One rank of `weft generate`: rank 0 reads prompts and writes texts, the others compute with it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from weft.launch.errors import UserError
from weft.launch.inference import open_session
from weft.launch.prompts import read_prompts
from weft.launch.source import open_source
from weft.launch.text_stream import TextStream
from weft.launch.vocabulary import Vocabulary, open_vocabulary
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling

SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


@dataclass
class Text:
    """A prompt, the request that goes on from it, and the text so far."""

    line: dict[str, Any]
    request: Request
    stream: TextStream
    shown: TextIO | None = None
    parts: list[str] = field(default_factory=list)

    def watch(self, request: Request) -> bool:
        """Take the newest token, or what was held back at the end; True when a stop string has come."""
        new = self.stream.finish() if request.finish else self.stream.push(request.generated[-1].number)
        self.parts.append(new)
        if self.shown is not None:
            self.shown.write(new)
            self.shown.flush()
        return self.stream.stopped

    def result(self) -> dict[str, Any]:
        facts = {"text": "".join(self.parts), "tokens": len(self.request.generated), "finish": self.request.finish}
        return self.line | facts


def main(path: str, arguments: Sequence[str]) -> None:
    """Generate as the options, JSON in `arguments[0]`, say.

    Raises:
        UserError: the checkpoint or a prompt cannot be used.
    """
    options, overrides = json.loads(arguments[0]), arguments[1:]
    source = open_source(path, overrides)
    vocabulary = open_vocabulary(source)
    texts = read_texts(options, vocabulary, apart=source.config.kind == "encoder-decoder")
    # a decoder behind an encoder writes a text of its own
    together = max if source.config.kind == "encoder-decoder" else int.__add__
    longest = max(together(text.request.length, text.request.max_tokens) for text in texts)
    pipeline = source.settings.parallel.pipeline
    session = open_session(
        source,
        slots=max(min(options["batch"], len(texts)) * options["beams"], pipeline * options["beams"]),
        capacity=min(longest, source.config.longest_text),
    )
    try:
        if dist.get_rank() != 0:
            session.follow()
            return
        for text in texts:
            session.scheduler.check(text.request)
        _drive(session, texts, options)
        session.close()
    except ValueError as error:
        raise UserError(f"{error}.") from None
    finally:
        dist.destroy_process_group()


def read_texts(options: dict[str, Any], vocabulary: Vocabulary, *, apart: bool = False) -> list[Text]:
    """The texts to generate, the n-th with a seed of its own; `apart`: they do not go on from their prompts.

    Raises:
        UserError: a sampling option is out of its range, or the file of prompts cannot be used.
    """
    lines = [{"prompt": prompt} for prompt in options["prompts"]] or read_prompts(Path(options["file"]))
    texts = []
    for number, line in enumerate(lines):
        tokens = vocabulary.encode(line["prompt"])
        request = Request(
            tokens,
            options["max_tokens"],
            _sampling(options, number),
            vocabulary.stop_tokens,
            beams=options["beams"],
            length_penalty=options["length_penalty"],
        )
        text = Text(line, request, TextStream(vocabulary.tokenizer, [] if apart else tokens, options["stops"]))
        request.watch = text.watch
        texts.append(text)
    return texts


def _sampling(options: dict[str, Any], number: int) -> Sampling:
    given = {name: options[name] for name in SAMPLING}
    try:
        sampling = Sampling(**given, seed=options["seed"] + number)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}.") from None
    if options["beams"] == 1:
        return sampling
    drawn = next((name for name in SAMPLING if given[name] not in (getattr(Sampling, name), 0)), None)
    if drawn is not None:
        raise UserError(f"--beams takes the likeliest text and draws nothing; leave out --{drawn.replace('_', '-')}.")
    return Sampling(temperature=0)


def _drive(session: Any, texts: list[Text], options: dict[str, Any]) -> None:
    if options["file"] is None and len(texts) == 1:
        sys.stdout.write(f"{texts[0].line['prompt']}│")
        texts[0].shown = sys.stdout
    session.run([text.request for text in texts])
    if options["file"] is None:
        for text in texts:
            print("" if text.shown else f"{text.line['prompt']}│{''.join(text.parts)}\n", flush=True)
        return
    lines = "".join(f"{json.dumps(text.result(), ensure_ascii=False)}\n" for text in texts)
    if options["output"] is None:
        sys.stdout.write(lines)
        sys.stdout.flush()
    else:
        _write(Path(options["output"]), lines)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    work = path.with_name(f".{path.name}.part")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(path)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}; choose another file.") from None
