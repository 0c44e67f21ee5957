"""Text that comes token by token is the text that comes at once, cut before the first stop string."""

from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launch.tiny_run import WORDS
from weft.launch.text_stream import TextStream
from weft.launch.tokenizer import train_tokenizer


@cache
def tokenizer() -> Any:
    return train_tokenizer([WORDS * 20], 300)


texts = st.text(alphabet="abc \n漢🧵é�", max_size=30)


@given(texts, texts, st.lists(st.text(alphabet="abc \n漢", min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_pieces_make_up_the_text_before_a_stop_string(prompt: str, text: str, stops: list[str]) -> None:
    tokens = tokenizer().encode(text).ids
    stream = TextStream(tokenizer(), tokenizer().encode(prompt).ids, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)


def test_half_a_character_at_the_end_is_shown_as_unknown() -> None:
    tokens = tokenizer().encode("a🧵").ids
    stream = TextStream(tokenizer(), [])
    shown = "".join(stream.push(token) for token in tokens[:-1])
    assert shown == "a"
    assert set(stream.finish()) == {"�"}
