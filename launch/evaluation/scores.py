"""How likely texts are to a model, and how it goes on, for many texts at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from weft.launch.text_stream import TextStream
from weft.launch.vocabulary import Vocabulary
from weft.model.generation.driver import Session
from weft.model.generation.request import Request, Token
from weft.model.generation.sampling import Sampling


class Likelihood(NamedTuple):
    """Of a continuation: the log-probability of each of its tokens in nats, and whether each was the likeliest."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class Scorer:
    """Asks a session; on rank 0."""

    def __init__(self, session: Session, vocabulary: Vocabulary) -> None:
        self.session, self.vocabulary = session, vocabulary
        self.capacity = session.worker.capacity

    @property
    def prefix(self) -> list[int]:
        """What stands before a text: the tokens that the tokenizer puts there, or the end of the text before."""
        return self.vocabulary.encode("")

    def likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Of each continuation after its context; a context that is too long is cut at its front.

        Raises:
            ValueError: a continuation has no tokens, or more than the model has positions.
        """
        requests = []
        for context, continuation in pairs:
            if not 0 < len(continuation) < self.capacity:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; it must have from 1 to {self.capacity - 1}"
                )
            kept = context[-(self.capacity - len(continuation)) :] or self.prefix[-1:]
            requests.append(Request([*kept, *continuation], 0, top=1, score=True))
        self.session.run(requests)
        return [
            _likelihood(request.scores[-len(continuation) :])
            for request, (_, continuation) in zip(requests, pairs, strict=True)
        ]

    def continuation(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of what follows it, cut where the tokens of both together allow it.

        Spaces at the context's end belong to what follows, since tokenizers put them in front of words.
        """
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        whole = self.vocabulary.encode(stripped + text)
        start = len(self.vocabulary.encode(stripped)) if stripped else 0
        if not stripped:
            return self.prefix, whole
        start = min(start, len(whole) - 1)
        return whole[:start], whole[start:]

    def greedy(self, prompts: Sequence[str], stops: Sequence[Sequence[str]], most: Sequence[int]) -> list[str]:
        """The likeliest text after each prompt, up to a stop string or a number of tokens; long prompts lose their
        front."""
        requests, texts = [], []
        for prompt, ends, tokens in zip(prompts, stops, most, strict=True):
            tokens = min(tokens, self.capacity - 1)
            encoded = self.vocabulary.encode(prompt)[-(self.capacity - tokens) :]
            stream, parts = TextStream(self.vocabulary.tokenizer, encoded, ends), list[str]()

            def watch(request: Request, stream: TextStream = stream, parts: list[str] = parts) -> bool:
                parts.append(stream.finish() if request.finish else stream.push(request.generated[-1].number))
                return stream.stopped

            likeliest = Sampling(temperature=0)
            requests.append(Request(encoded, tokens, likeliest, self.vocabulary.stop_tokens, watch=watch))
            texts.append(parts)
        self.session.run(requests)
        return ["".join(parts) for parts in texts]


def _likelihood(tokens: Sequence[Token]) -> Likelihood:
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    return Likelihood(logprobs, all(token.likeliest[0][0] == token.number for token in tokens))
