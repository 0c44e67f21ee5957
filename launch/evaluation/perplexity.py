"""How well a model predicts a text: perplexity of its tokens, and bits per byte, which compares across tokenizers."""

from collections.abc import Iterator
from math import exp, log
from pathlib import Path

from weft.launch.errors import UserError
from weft.launch.evaluation.results import Result, ratio
from weft.launch.evaluation.scores import Scorer


def perplexity(path: Path, scorer: Scorer, window: int) -> list[Result]:
    """Loss in nats per token, perplexity and bits per byte of a file.

    Every token of the file is scored once, with at least half a window of the text before it where there is as much.
    Standard errors take windows for independent.

    Raises:
        UserError: the file cannot be read, is empty or is no text.
    """
    text = _read(path)
    body: list[int] = scorer.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [*scorer.prefix, *body]
    pairs = list(windows(tokens, len(tokens) - len(body), window))
    losses = [-likelihood.total for likelihood in scorer.likelihoods(pairs)]
    counts = [float(len(scored)) for _, scored in pairs]
    share = len(text.encode()) / len(body)
    loss, error = ratio(losses, counts)
    bits, bits_error = loss / log(2) / share, None if error is None else error / log(2) / share
    name, count = str(path), len(body)
    # the standard error of exp(x) is exp(x) times that of x, to first order
    return [
        Result(name, "loss, nats per token", loss, error, count),
        Result(name, "perplexity", exp(loss), None if error is None else exp(loss) * error, count),
        Result(name, "bits per byte", bits, bits_error, count),
    ]


def windows(tokens: list[int], first: int, window: int) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and what is scored after them: the tokens from number `first` on, each once.

    Together they have at most `window` tokens; all but the first window take at most half of it for what they score.
    """
    begin = first
    while begin < len(tokens):
        context_start = max(0, begin - window // 2) if begin > first else 0
        end = min(len(tokens), context_start + window)
        yield tokens[context_start:begin], tokens[begin:end]
        begin = end


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not text in UTF-8.") from None
    if not text:
        raise UserError(f"--text {path} is empty.")
    return text
