"""Corpora: what is read, how it is split, and the sentence that each fault gets."""

import json
import os
from pathlib import Path

import pytest

from weft.launch.corpus import BUILTIN, Corpus, check_corpus, corpus_files, read_corpus
from weft.launch.errors import UserError


@pytest.fixture(scope="module")
def builtin() -> Corpus:
    return read_corpus(BUILTIN)


def write_lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_builtin_is_prose_of_about_two_megabytes_and_repeats_itself_exactly(builtin: Corpus) -> None:
    again = read_corpus(BUILTIN)
    assert (again.train, again.held_out, again.info) == (builtin.train, builtin.held_out, builtin.info)
    assert builtin.info.train_bytes == sum(len(text.encode()) for text in builtin.train) > 1_000_000
    assert 0.01 < builtin.info.held_out_bytes / builtin.info.train_bytes < 0.1
    assert any("Identifiers (Names)" in text for text in builtin.train[:80])


def test_builtin_holds_out_no_text_that_it_trains_on(builtin: Corpus) -> None:
    paragraphs = {part for text in builtin.train for part in text.split("\n\n") if len(part) > 200}
    held_out = {part for text in builtin.held_out for part in text.split("\n\n") if len(part) > 200}
    assert held_out
    assert len(held_out & paragraphs) <= 0.03 * len(held_out)


def test_builtin_runs_no_module_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text('topics = {"one": "The first topic."}\n')
    for number in range(60):
        source = f'"""Docstring {number}."""\nraise SystemExit\ndef f():\n    """Of f {number}."""\n'
        (tmp_path / f"module{number}.py").write_text(source)
    (tmp_path / "copy.py").write_text('"""Docstring 0."""\nclass C:\n    """Its own."""\n')
    monkeypatch.setattr("weft.launch.python_text.sysconfig.get_path", lambda name: str(tmp_path))
    corpus = read_corpus(BUILTIN)
    documents = corpus.train + corpus.held_out
    assert corpus.train[0] == "The first topic."
    assert len(documents) == 62
    assert sum("Docstring 0." in text for text in documents) == 1, "the same docstring twice"
    assert "Docstring 7.\n\nOf f 7.\n" in documents


def test_a_python_without_its_reference_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.launch.python_text.sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"topics\.py, which this Python lacks"):
        check_corpus(BUILTIN)


def test_folder_is_read_in_the_order_of_names_whatever_the_file_system_says(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.text", "a.txt", "skip.py", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    names = [file.relative_to(tmp_path).as_posix() for file in corpus_files(tmp_path)]
    assert names == ["a.txt", "a/b/c.text", "a/z.md", "b.txt"]


def test_jsonl_lines_are_documents_and_every_one_is_on_one_side(tmp_path: Path) -> None:
    texts = [f"Document {number}, line one.\u2028Still it.\nLine two." for number in range(2000)]
    corpus = read_corpus(write_lines(tmp_path / "x.jsonl", texts))
    assert sorted(corpus.train + corpus.held_out) == sorted(texts)
    assert 0.03 < len(corpus.held_out) / len(texts) < 0.07


def test_a_document_stays_on_its_side_when_others_come_or_go(tmp_path: Path) -> None:
    texts = [f"Document number {number}." for number in range(1000)]
    all_of_them = read_corpus(write_lines(tmp_path / "all.jsonl", texts))
    half = read_corpus(write_lines(tmp_path / "half.jsonl", texts[::-2]))
    assert set(half.held_out) == set(all_of_them.held_out) & set(texts[::-2])


@pytest.mark.parametrize("texts", [["one long text, " * 100], ["short " * 9, "a long one " * 5000], ["ab" * 10]])
def test_few_documents_give_their_ends(tmp_path: Path, texts: list[str]) -> None:
    corpus = read_corpus(write_lines(tmp_path / "few.jsonl", texts))
    assert [a + b for a, b in zip(corpus.train, corpus.held_out, strict=True)] == texts
    share = sum(map(len, corpus.held_out)) / sum(map(len, texts))
    assert share == pytest.approx(0.05, abs=0.002)


def test_byte_order_mark_and_line_ends_are_left_as_users_expect(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n" + "zwei ß\r\n".encode() * 20)
    corpus = read_corpus(tmp_path / "a.txt")
    assert (corpus.train + corpus.held_out)[0].startswith("one\r\n")


FAULTS = {
    "missing.txt": (None, r"missing\.txt does not exist"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n ", "no text to train on"),
    "null.txt": (b"abc\0def", "not UTF-8 text at byte 3"),
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8 text at byte 3"),
    "cut.txt": ("naïve é".encode()[:-1], "not UTF-8 text at byte 7"),
    "null.jsonl": (b'{"text": "a"}\n{"text": "b\0"}\n', "not UTF-8 text at byte 25"),
    "key.jsonl": (b'\n{"content": "a"}\n', r'key\.jsonl:2 has no text under the key "text"'),
    "number.jsonl": (b'{"text": 1}', r"number\.jsonl:1 has no text"),
    "list.jsonl": (b"[1]", r"list\.jsonl:1 has no text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2 is not JSON"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', r"surrogate\.jsonl:1 holds half a surrogate"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_corpus(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "null.txt", "latin.txt", "cut.txt", "list.jsonl"])
def test_the_quick_check_finds_the_faults_at_the_start(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_corpus(tmp_path / name)


def test_the_quick_check_reads_the_start_alone_and_cuts_no_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" + "é".encode() * 600_000)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' + json.dumps({"text": "é" * 400_000}))
    check_corpus(tmp_path)


def test_folders_without_text_and_files_without_permission(tmp_path: Path) -> None:
    (tmp_path / "program.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"holds no file ending in \.txt"):
        check_corpus(tmp_path)
    if os.geteuid() != 0:
        (tmp_path / "secret.txt").write_text("secret")
        (tmp_path / "secret.txt").chmod(0)
        with pytest.raises(UserError, match=r"secret\.txt cannot be read"):
            check_corpus(tmp_path)
