"""Text to token numbers and back: byte-level byte-pair encoding, trained on the corpus or given by the user.

Byte-level means that any text has tokens and comes back byte for byte: the 256 byte values are in every vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.launch.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")

# A sample of this size gives merges as good as the whole of a larger corpus, in seconds.
_SAMPLE_BYTES = 2_000_000
_PIECE = 10_000  # characters of one piece of the sample
_BATCH = 1_000_000  # characters encoded in one call


def train_tokenizer(documents: list[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE with at most `vocab_size` entries, `<|endoftext|>` (number 0) among them.

    A small corpus gives fewer entries, because a merge must occur twice to be learnt. Byte-pair encoding of text is due
    to Sennrich et al. (2016), its byte-level form to Radford et al. (2019).

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.vocab_size {vocab_size} is too small for a byte-level tokenizer; "
            f"choose {SMALLEST_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return tokenizer


def _sample(documents: list[str]) -> Iterator[str]:
    """Pieces spread evenly over all documents, together of about `_SAMPLE_BYTES`."""
    step = max(1, round(sum(len(text) for text in documents) / _SAMPLE_BYTES))
    pieces = (text[at : at + _PIECE] for text in documents for at in range(0, len(text), _PIECE))
    return (piece for number, piece in enumerate(pieces) if number % step == 0)


def tokenizer_file(path: str | Path) -> Path:
    """The `tokenizer.json` that `path` means: the file itself, or the one in a folder such as Hugging Face's.

    Raises:
        UserError: there is none.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"corpus.tokenizer {path}: {file} does not exist; give auto, a tokenizer.json or its folder")
    return file


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a `tokenizer.json`, or the one in a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"corpus.tokenizer {file} is not a tokenizer.json: {error}") from None


def end_of_text(tokenizer: "Tokenizer", source: Path | None = None) -> int:
    """The number of the token that ends a document: `eos_token` of the `tokenizer_config.json` in folder `source`,
    else `<|endoftext|>`, else another that models use.

    Raises:
        UserError: the tokenizer has none of them.
    """
    names = (*_configured_end(source), END_OF_TEXT, *_OTHER_ENDS)
    for name in names:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return int(number)
    raise UserError(f"corpus.tokenizer {source or ''} has no end-of-text token ({', '.join(names)}); add one of them")


def _configured_end(folder: Path | None) -> tuple[str, ...]:
    file = folder / "tokenizer_config.json" if folder else None
    if file is None or not file.is_file():
        return ()
    settings: dict[str, Any] = json.loads(file.read_text())
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return (token,) if isinstance(token, str) else ()


def encode_documents(tokenizer: "Tokenizer", documents: list[str], end: int) -> np.ndarray:
    """All documents as one row of token numbers (uint16 or, for large vocabularies, uint32), each followed by `end`.

    Special tokens written in the text are those tokens: files that part their documents by `<|endoftext|>` are common.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    rows: list[np.ndarray] = []
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for tokens, (_, last) in zip(encoded, batch, strict=True):
            rows.append(np.array(tokens.ids + [end] * last, dtype=dtype))
    return np.concatenate(rows) if rows else np.empty(0, dtype)


def _batches(documents: list[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, and whether each is its document's last, in lists of about `_BATCH` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in documents:
        for piece, last in _pieces(text):
            batch.append((piece, last))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """A document, cut at ends of lines when it is long: encoding takes many times the memory of its text."""
    start = 0
    while len(text) - start > _BATCH:
        cut = text.rfind("\n", start, start + _BATCH) + 1 or start + _BATCH
        yield text[start:cut], False
        start = cut
    yield text[start:], True
