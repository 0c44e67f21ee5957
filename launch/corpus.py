"""The text to learn: Python's own documentation, which every machine has, or the user's file or folder.

A corpus is a list of documents, already split into train and held-out text. The split depends on the text alone, so
every process, layout and resumed run sees the same.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weft.launch import python_text
from weft.launch.errors import UserError

BUILTIN = "builtin"
SUFFIXES = (".txt", ".text", ".md", ".jsonl")
HELD_OUT_SHARE = 0.05

_FIRST_BLOCK = 1 << 20  # bytes of each file that a check reads


@dataclass(frozen=True)
class CorpusInfo:
    """What a run records of its corpus; sizes are UTF-8 bytes, `sha256` is of all documents, train first."""

    path: str
    train_documents: int
    train_bytes: int
    held_out_documents: int
    held_out_bytes: int
    sha256: str
    python: str | None


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; neither list is empty."""

    train: list[str]
    held_out: list[str]
    info: CorpusInfo


def read_corpus(path: str | Path) -> Corpus:
    """Read a corpus whole: `builtin`, one text or JSONL file, or a folder of such files (recursive).

    Text is UTF-8; a JSONL line is an object with its document under `text`. Folders are read in the order of their
    relative names, other file types and hidden names are left out.

    Raises:
        UserError: nothing is there, nothing is in it, or something in it is not text.
    """
    if str(path) == BUILTIN:
        train, held_out = _split_by_module(python_text.documents(python_text.standard_library()))
    else:
        train, held_out = _split_by_text([text for text in _user_documents(Path(path)) if text.strip()])
    if not train or not held_out:
        raise UserError(f"corpus.path {path} has no text to train on and to hold out; give a corpus with more text")
    return Corpus(train, held_out, _describe(str(path), train, held_out))


def check_corpus(path: str | Path) -> None:
    """Find what is wrong with a corpus from its file names and the first MiB of each file.

    Raises:
        UserError: as `read_corpus` does, for the faults that show there.
    """
    for file in corpus_files(path):
        with file.open("rb") as opened:
            head = opened.read(_FIRST_BLOCK)
            cut = bool(opened.read(1))
        if file.suffix == ".jsonl":
            complete_lines = head[: head.rfind(b"\n") + 1] if cut else head
            next(_jsonl_documents(file, complete_lines), None)
        else:
            _decode(head, file, cut=cut)


def corpus_files(path: str | Path) -> list[Path]:
    """The files that a corpus is read from, in reading order.

    Raises:
        UserError: the path is missing, unreadable or empty, or a folder without text files.
    """
    if str(path) == BUILTIN:
        root = python_text.standard_library()
        return [root / name for name in python_text.module_names(root)]
    try:
        files = _text_files(Path(path))
        size = sum(_readable_size(file) for file in files)
    except FileNotFoundError:
        raise UserError(f"corpus.path {path} does not exist; give a file, a folder or {BUILTIN}") from None
    except OSError as error:
        raise UserError(f"corpus.path {error.filename or path} cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"corpus.path {path} holds no file ending in {', '.join(SUFFIXES)}; choose a folder with text")
    if not size:
        raise UserError(f"corpus.path {path} is empty; give a corpus with text")
    return files


def _text_files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.suffix in SUFFIXES)
    visible = [root / name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    return [file for file in visible if file.is_file()]


def _readable_size(file: Path) -> int:
    with file.open("rb") as opened:
        return opened.seek(0, 2)


def _user_documents(path: Path) -> Iterator[str]:
    for file in corpus_files(path):
        if file.suffix == ".jsonl":
            yield from _jsonl_documents(file, file.read_bytes())
        else:
            yield _decode(file.read_bytes(), file)


def _jsonl_documents(file: Path, data: bytes) -> Iterator[str]:
    start = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _text_of_line(f"{file}:{number}", _decode(line, file, start=start))
        start += len(line) + 1


def _decode(data: bytes, file: Path, *, start: int = 0, cut: bool = False) -> str:
    """UTF-8 text of `data`, found at byte `start` of `file`; where it was cut, a last half character is dropped."""
    fault = data.find(b"\0")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text = data[: error.start].decode()
        if not (cut and error.reason == "unexpected end of data"):
            fault = min(fault, error.start) if fault >= 0 else error.start
    if fault >= 0:
        raise UserError(f"corpus file {file} is not UTF-8 text at byte {start + fault}; convert it or leave it out")
    return text.removeprefix("\ufeff")


def _text_of_line(place: str, line: str) -> str:
    try:
        value = json.loads(line)
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise UserError(f'corpus line {place} has no text under the key "text"; write {{"text": "…"}} on each line')
        text.encode()
    except json.JSONDecodeError as error:
        raise UserError(f"corpus line {place} is not JSON ({error}); write one JSON object on each line") from None
    except UnicodeEncodeError:
        raise UserError(f"corpus line {place} holds half a surrogate pair; write whole characters") from None
    return text


def _split_by_module(documents: Iterator[python_text.Document]) -> tuple[list[str], list[str]]:
    """Whole modules are held out, so that held-out text is by authors and on matters of its own."""
    train: list[str] = []
    held_out: list[str] = []
    for name, text in documents:
        aside = name != python_text.TOPICS and _share(name) < HELD_OUT_SHARE
        (held_out if aside else train).append(text)
    return train, held_out


def _split_by_text(documents: list[str]) -> tuple[list[str], list[str]]:
    """Documents are held out by the hash of their text; where too few make a fair share, the end of each is."""
    aside = [_share(text) < HELD_OUT_SHARE for text in documents]
    size = sum(len(text) for text in documents)
    held_out = [text for text, out in zip(documents, aside, strict=True) if out]
    if HELD_OUT_SHARE / 2 <= sum(len(text) for text in held_out) / max(size, 1) <= HELD_OUT_SHARE * 2:
        return [text for text, out in zip(documents, aside, strict=True) if not out], held_out
    cuts = [len(text) - max(1, round(len(text) * HELD_OUT_SHARE)) for text in documents]
    train = [text[:cut] for text, cut in zip(documents, cuts, strict=True) if cut]
    return train, [text[cut:] for text, cut in zip(documents, cuts, strict=True)]


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _describe(path: str, train: list[str], held_out: list[str]) -> CorpusInfo:
    digest = hashlib.sha256()
    sizes = []
    for documents in (train, held_out):
        size = 0
        for text in documents:
            data = text.encode()
            size += len(data)
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        sizes.append(size)
    python = platform.python_version() if path == BUILTIN else None
    return CorpusInfo(path, len(train), sizes[0], len(held_out), sizes[1], digest.hexdigest(), python)
