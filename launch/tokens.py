"""A corpus as memory-mapped token numbers: prepared once, kept in a cache, read by every process of a job."""

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.launch.corpus import BUILTIN, CorpusInfo, corpus_files, read_corpus
from weft.launch.errors import UserError
from weft.launch.tokenizer import encode_documents, end_of_text, load_tokenizer, tokenizer_file, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AUTO = "auto"
_FORMAT = 1  # of the cache folder; also raised when documents or their tokens would come out otherwise
_FILES = ("tokenizer.json", "train.npy", "held_out.npy")


@dataclass(frozen=True)
class TokenInfo:
    """What a run records of its tokens; `bytes_per_token` is UTF-8 bytes per target token of the held-out text."""

    corpus: CorpusInfo
    vocabulary: int
    end_of_text: int
    train_tokens: int
    held_out_tokens: int
    bytes_per_token: float


@dataclass(frozen=True)
class TokenisedCorpus:
    """Token numbers [tokens] of the train and the held-out text, memory-mapped and read-only."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: "Tokenizer"
    info: TokenInfo

    def bits_per_byte(self, nats_per_token: float, *, targets: int | None = None) -> float:
        """A held-out loss in bits per UTF-8 byte, which compares across tokenizers.

        `targets` is how many targets, from the start of the held-out text, the loss is the mean of; all by default.
        """
        bytes_per_token = self.info.bytes_per_token
        if targets is not None:
            bytes_per_token = _bytes_per_target(self.tokenizer, self.held_out[: targets + 1])
        return nats_per_token / math.log(2) / bytes_per_token


def default_cache_directory() -> Path:
    """`$XDG_CACHE_HOME/weft`, or `~/.cache/weft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


def prepare(
    path: str | Path,
    *,
    vocab_size: int,
    sequence_length: int,
    tokenizer: str | Path = AUTO,
    cache_directory: Path | None = None,
) -> TokenisedCorpus:
    """Read, tokenise and cache a corpus, or map what the cache holds of it already.

    Every process of a job may call this, at the same time too: one does the work, the others wait for it. The cache is
    keyed by the corpus' content, the vocabulary and the tokenizer, is written whole or not at all, and is built anew
    when a file of it is damaged.

    Args:
        path: `builtin`, a text or JSONL file, or a folder of them.
        vocab_size: of the model: the most entries that the tokenizer may have.
        sequence_length: tokens of one training sequence.
        tokenizer: `auto` (trained on the corpus), a `tokenizer.json`, or a folder with one.
        cache_directory: `default_cache_directory()` unless given.

    Raises:
        UserError: the corpus, tokenizer or cache folder cannot be used, or the text is too short for one sequence.
    """
    cache = cache_directory or default_cache_directory()
    folder = cache / f"tokens-{_key(path, tokenizer, vocab_size)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            tokens = _load(folder)
            if tokens is None:
                _build(folder, path, tokenizer, vocab_size)
                tokens = _load(folder)
    except OSError as error:
        raise UserError(f"the token cache {cache} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from None
    if tokens is None:
        raise UserError(f"the token cache {folder} does not read back as written; set XDG_CACHE_HOME to a sound disk")
    _check_length(tokens.info, path, sequence_length)
    return tokens


def _check_length(info: TokenInfo, path: str | Path, sequence_length: int) -> None:
    if info.train_tokens <= sequence_length:
        raise UserError(
            f"corpus.path {path} gives {info.train_tokens:,} training tokens, too few for one sequence of "
            f"corpus.sequence_length {sequence_length:,}; give more text or a shorter sequence"
        )


def _key(path: str | Path, tokenizer: str | Path, vocab_size: int) -> str:
    """A hash of all that the tokens depend on."""
    import tokenizers

    digest = hashlib.sha256(f"{_FORMAT} {tokenizers.__version__} {vocab_size}".encode())
    if str(path) == BUILTIN:
        digest.update(f"python {platform.python_version()}".encode())
    files = corpus_files(path)
    if str(tokenizer) != AUTO:
        file = tokenizer_file(tokenizer)
        files += [file, *(other for other in [file.with_name("tokenizer_config.json")] if other.is_file())]
    for file in files:
        digest.update(f"\n{file.name} {_sha256(file)}".encode())
    return digest.hexdigest()[:32]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock between processes. Where the file system has none, two may do the same work; the rename decides."""
    with file.open("w") as opened:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- reading the cache


def _load(folder: Path) -> TokenisedCorpus | None:
    """What the cache holds, or None when it is absent or damaged."""
    try:
        record: dict[str, Any] = json.loads((folder / "info.json").read_text())
        if any(_sha256(folder / name) != record["files"][name] for name in _FILES):
            return None
        info = TokenInfo(**{**record["tokens"], "corpus": CorpusInfo(**record["tokens"]["corpus"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    train, held_out = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _FILES[1:])
    return TokenisedCorpus(train, held_out, load_tokenizer(folder), info)


# ---------------------------------------------------------------- writing it


def _build(folder: Path, path: str | Path, tokenizer: str | Path, vocab_size: int) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        info = _write_tokens(work, path, tokenizer, vocab_size)
        record = {"tokens": asdict(info), "files": {name: _sha256(work / name) for name in _FILES}}
        (work / "info.json").write_text(json.dumps(record, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # on a file system without locks, another process was first
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_tokens(work: Path, path: str | Path, tokenizer: str | Path, vocab_size: int) -> TokenInfo:
    corpus = read_corpus(path)
    if str(tokenizer) == AUTO:
        encoder, source = train_tokenizer(corpus.train, vocab_size), None
    else:
        encoder, source = load_tokenizer(tokenizer), tokenizer_file(tokenizer).parent
    entries = _highest_number(encoder) + 1
    if entries > vocab_size:
        raise UserError(
            f"corpus.tokenizer {tokenizer} has {entries:,} entries, more than model.vocab_size {vocab_size:,}; "
            f"set model.vocab_size to {entries} or more"
        )
    end = end_of_text(encoder, source)
    train = encode_documents(encoder, corpus.train, end)
    held_out = encode_documents(encoder, corpus.held_out, end)
    np.save(work / "train.npy", train, allow_pickle=False)
    np.save(work / "held_out.npy", held_out, allow_pickle=False)
    encoder.save(str(work / "tokenizer.json"))
    return TokenInfo(corpus.info, entries, end, len(train), len(held_out), _bytes_per_target(encoder, held_out))


def _highest_number(tokenizer: "Tokenizer") -> int:
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values()))


def _bytes_per_target(tokenizer: "Tokenizer", tokens: np.ndarray) -> float:
    """UTF-8 bytes of the text that all tokens but the first stand for, divided by how many those are."""
    whole, first = (len(tokenizer.decode(part.tolist()).encode()) for part in (tokens, tokens[:1]))
    return (whole - first) / max(len(tokens) - 1, 1)
