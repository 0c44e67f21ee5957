"""Beam search (Lowerre 1976; Sutskever et al. 2014): several likely beginnings of one text go on beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Candidates = Sequence[tuple[int, float]]
"""Tokens with their log-probabilities, likeliest first."""


class Beam(NamedTuple):
    """A beginning of the text: its new tokens, the sum of their log-probabilities, and which beam it goes on from."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    parent: int = 0


@dataclass
class BeamSearch:
    """The beams of one text.

    A text that has ended is judged by its score divided by `length ** length_penalty` (Wu et al. 2016, without their
    constant), its last token counted. The search is over when as many texts have ended as there are beams and the best
    that goes on is, at its length so far, no better than the worst of them.

    Attributes:
        beams: how many beginnings go on at a time.
        max_tokens: new tokens at most.
        stop_tokens: tokens that end a text.
        running: the beginnings that go on, best first; at first the prompt alone.
        finished: scores and tokens of texts that have ended, best first.
    """

    beams: int
    max_tokens: int
    stop_tokens: frozenset[int]
    length_penalty: float = 1.0
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    over: bool = False

    @property
    def width(self) -> int:
        """Candidates that are looked at: as many beams go on though every beam's likeliest tokens end it."""
        return max(2, 1 + len(self.stop_tokens)) * self.beams

    @property
    def best(self) -> tuple[int, ...]:
        """The tokens of the best text."""
        return self.finished[0][1]

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """Go on with the `width` likeliest next tokens of each running beam."""
        joined = [
            Beam((*beam.tokens, token), beam.score + logprob, index)
            for index, beam in enumerate(self.running)
            for token, logprob in candidates[index]
        ]
        joined = sorted(joined, key=lambda beam: -beam.score)[: self.width]
        length = len(joined[0].tokens)
        judged = length**self.length_penalty
        going = [beam for beam in joined if not self._ends(beam)]
        self.finished += [(beam.score / judged, beam.tokens) for beam in joined[: self.beams] if self._ends(beam)]
        self.finished = sorted(self.finished, key=lambda text: -text[0])[: self.beams]
        self.running = going[: self.beams]
        full = len(self.finished) == self.beams
        self.over = not going or (full and going[0].score / judged <= self.finished[-1][0])

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self.stop_tokens or len(beam.tokens) >= self.max_tokens
