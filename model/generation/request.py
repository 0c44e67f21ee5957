"""A text to go on with, and what has become of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from weft.model.generation.beams import BeamSearch
from weft.model.generation.plan import NO_LOGPROBS
from weft.model.generation.sampling import Sampling

Finish = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One token of a text; log-probabilities are in nats and before temperature and filters.

    `likeliest`: tokens with their log-probabilities, likeliest first, as many as the request asked for.
    """

    number: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt, how to go on from it, and what came of it.

    Attributes:
        tokens: the prompt.
        max_tokens: new tokens at most; 0 generates nothing.
        sampling: how tokens are drawn.
        stop_tokens: tokens that end the text; they are not part of it.
        top: likeliest tokens to tell with their log-probabilities; 0 tells that of the chosen token alone, -1 none.
        score: whether the prompt's own tokens are scored first.
        beams: of more than one, the best text that a beam search finds is taken; nothing is drawn, and `watch` is told
            of its tokens when all are there.
        length_penalty: of the beam search.
        watch: called after every token and at the end; True ends the text here.
        cancelled: set from any thread, ends the text before its next token.
        generated: the new tokens.
        scores: the prompt's tokens but the first, once `scored`.
        finish: why the text ended; None while it goes on.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    top: int = NO_LOGPROBS
    score: bool = False
    beams: int = 1
    length_penalty: float = 1.0
    watch: Callable[["Request"], bool] | None = None
    cancelled: bool = False
    generated: list[Token] = field(default_factory=list)
    scores: list[Token] = field(default_factory=list)
    scored: bool = False
    finish: Finish | None = None
    search: BeamSearch | None = None

    @property
    def to_score(self) -> bool:
        """Whether the prompt's tokens are to be scored next."""
        return self.score and not self.scored

    @property
    def length(self) -> int:
        """Tokens of the whole text so far."""
        return len(self.tokens) + len(self.generated)

    def end_search(self) -> None:
        """Take the best text that was found."""
        assert self.search is not None
        *tokens, last = self.search.best
        stopped = last in self.stop_tokens
        reason: Finish = "stop" if stopped else "length"
        for number in tokens if stopped else self.search.best:
            self.generated.append(Token(number))
            if self.watch is not None and self.watch(self):
                reason = "stop"
                break
        self.end(reason)

    def end(self, reason: Finish) -> None:
        self.finish = reason
        if self.watch is not None:
            self.watch(self)


def read_token(row: Sequence[float], top: int) -> Token:
    """A token from its columns as `Plan.answer_shape` tells them, with what a request for `top` is to be told."""
    if top == NO_LOGPROBS:
        return Token(int(row[0]))
    told = (len(row) - 2) // 2
    numbers, logprobs = row[2 : 2 + told], row[2 + told :]
    return Token(int(row[0]), row[1], tuple(zip(map(int, numbers), logprobs, strict=True))[:top])
