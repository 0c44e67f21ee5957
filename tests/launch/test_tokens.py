"""Tokenizers and the token cache: exact round trips, one build for many processes, damage mended."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from weft.launch.errors import UserError
from weft.launch.tokenizer import END_OF_TEXT, encode_documents, end_of_text, load_tokenizer, train_tokenizer
from weft.launch.tokens import TokenisedCorpus, default_cache_directory, prepare

WORDS = [f"word{number % 70} and {number % 13} more; " for number in range(3000)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["".join(WORDS)], 400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    lines = ["".join(WORDS[number : number + 12]) + "ß😀" for number in range(0, 3000, 12)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def prepared(corpus: Path, vocab_size: int = 300, sequence_length: int = 16, **options: object) -> TokenisedCorpus:
    cache = corpus.parent / "cache"
    return prepare(corpus, vocab_size=vocab_size, sequence_length=sequence_length, cache_directory=cache, **options)


@given(text=st.text().filter(lambda text: END_OF_TEXT not in text))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_quick_and_repeats_itself() -> None:
    from weft.launch.corpus import read_corpus

    train = read_corpus("builtin").train
    start = time.perf_counter()
    first = train_tokenizer(train, 2048)
    assert time.perf_counter() - start < 10
    assert first.get_vocab_size() == 2048
    assert train_tokenizer(train, 2048).to_str() == first.to_str()


def test_documents_are_joined_by_the_end_of_text(tokenizer: Tokenizer) -> None:
    end = end_of_text(tokenizer)
    documents = ["word1 and", "", "2 more; "]
    tokens = encode_documents(tokenizer, documents, end)
    assert tokens.dtype == np.uint16
    parts = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)]
    assert [tokenizer.decode(part) for part in parts[:-1]] == documents
    assert parts[-1] == []


def test_an_end_of_text_written_in_the_text_is_one(tokenizer: Tokenizer) -> None:
    end = end_of_text(tokenizer)
    tokens = encode_documents(tokenizer, [f"one{END_OF_TEXT}two"], end)
    assert np.flatnonzero(tokens == end).tolist()[-1] == len(tokens) - 1
    assert np.count_nonzero(tokens == end) == 2


def test_long_documents_are_cut_at_lines_and_lose_nothing(tokenizer: Tokenizer) -> None:
    document = ("word1 and 2 more; é\n" * 60_000) + "x" * 1_200_000
    tokens = encode_documents(tokenizer, [document], end_of_text(tokenizer))
    assert tokenizer.decode(tokens.tolist()) == document
    assert np.count_nonzero(tokens == end_of_text(tokenizer)) == 1


def test_cache_gives_the_same_tokens_and_reads_no_text_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(corpus)
    monkeypatch.setattr("weft.launch.tokens.read_corpus", lambda path: pytest.fail("read again"))
    again = prepared(corpus, sequence_length=8)
    assert isinstance(again.train, np.memmap)
    assert np.array_equal(again.train, first.train)
    assert np.array_equal(again.held_out, first.held_out)
    assert again.info == first.info
    assert again.tokenizer.to_str() == first.tokenizer.to_str()


def test_changed_text_or_vocabulary_is_another_cache_entry(corpus: Path) -> None:
    first = prepared(corpus)
    assert prepared(corpus, vocab_size=290).info.vocabulary == 290
    corpus.write_text(corpus.read_text() + '{"text": "new"}\n')
    assert prepared(corpus).info.corpus.sha256 != first.info.corpus.sha256


@pytest.mark.parametrize("name", ["tokenizer.json", "train.npy", "held_out.npy", "info.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damage_is_mended(corpus: Path, name: str, damage: str) -> None:
    whole = prepared(corpus)
    train = np.array(whole.train)
    (file,) = (corpus.parent / "cache").glob(f"tokens-*/{name}")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(bytes(data) if damage == "flipped" else bytes(data[: len(data) // 2]))
    again = prepared(corpus)
    assert np.array_equal(again.train, train)
    assert again.info == whole.info


def test_processes_that_race_all_get_the_same(corpus: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from weft.launch.tokens import prepare\n"
        "corpus = Path(sys.argv[1])\n"
        "tokens = prepare(corpus, vocab_size=300, sequence_length=16, cache_directory=corpus.parent / 'cache')\n"
        "print(tokens.info, tokens.train.sum())"
    )
    command = [sys.executable, "-c", script, str(corpus)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    left = sorted(entry.name.split("-")[0] for entry in (corpus.parent / "cache").iterdir())
    assert left == ["tokens", "tokens"], "one folder and its lock"


def test_a_failed_build_leaves_nothing(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size 200 is too small for a byte-level tokenizer; choose 257"):
        prepared(corpus, vocab_size=200)
    assert [entry.suffix for entry in (corpus.parent / "cache").iterdir()] == [".lock"]


def test_small_corpora_give_small_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abab " * 20)
    tokens = prepared(tmp_path / "a.txt", vocab_size=5000)
    assert 257 <= tokens.info.vocabulary < 300
    assert tokens.train.max() < tokens.info.vocabulary


def test_too_little_text_for_a_sequence(corpus: Path) -> None:
    available = prepared(corpus).info.train_tokens
    assert prepared(corpus, sequence_length=available - 1).info.train_tokens == available
    with pytest.raises(UserError, match=r"training tokens, too few for one sequence of corpus\.sequence_length"):
        prepared(corpus, sequence_length=available)


def test_bits_per_byte_of_a_uniform_guess(corpus: Path) -> None:
    tokens = prepared(corpus)
    text = tokens.tokenizer.decode(tokens.held_out.tolist())
    assert sum(text.count(end) for end in (END_OF_TEXT,)) == 0
    assert len(text.encode()) == tokens.info.corpus.held_out_bytes
    first = len(tokens.tokenizer.decode(tokens.held_out[:1].tolist()).encode())
    targets = tokens.info.held_out_tokens - 1
    total_bits = targets * math.log2(tokens.info.vocabulary)
    guess = math.log(tokens.info.vocabulary)
    assert tokens.bits_per_byte(guess) == pytest.approx(total_bits / (len(text.encode()) - first))
    assert tokens.bits_per_byte(guess, targets=targets) == pytest.approx(tokens.bits_per_byte(guess))


def test_bits_per_byte_of_a_part(corpus: Path) -> None:
    tokens = prepared(corpus)
    part = len(tokens.tokenizer.decode(tokens.held_out[1:41].tolist()).encode())
    assert tokens.bits_per_byte(1.0, targets=40) == pytest.approx(40 / math.log(2) / part, rel=0.05)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_tokenizer_of_the_users_own(corpus: Path, tokenizer: Tokenizer, as_folder: bool) -> None:
    folder = corpus.parent / "mine"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder if as_folder else folder / "tokenizer.json"
    tokens = prepared(corpus, vocab_size=512, tokenizer=path)
    assert tokens.tokenizer.to_str() == tokenizer.to_str()
    size = tokenizer.get_vocab_size()
    refusal = rf"has {size} entries, more than model\.vocab_size {size - 1}; set model\.vocab_size to {size} or more"
    with pytest.raises(UserError, match=refusal):
        prepared(corpus, vocab_size=size - 1, tokenizer=path)


def test_the_end_of_text_is_the_one_that_a_folder_names(tmp_path: Path) -> None:
    own = train_tokenizer(["some text"], 300)
    own.add_special_tokens(["</s>", "<stop>"])
    assert end_of_text(own) == own.token_to_id(END_OF_TEXT)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert end_of_text(own, tmp_path) == own.token_to_id("<stop>")


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/tokenizer\.json does not exist|none does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_cache_that_cannot_be_made_says_so(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"token cache .* cannot be written: .*; set XDG_CACHE_HOME"):
        prepare(corpus, vocab_size=300, sequence_length=16, cache_directory=corpus / "under-a-file")


def test_the_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory() == Path("/somewhere/weft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_directory() == Path("/home/someone/.cache/weft")
