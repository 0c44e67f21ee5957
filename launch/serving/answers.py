"""From what becomes of texts to the answers of OpenAI's protocol, whole or in pieces."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.launch.serving.service import Event
from weft.launch.vocabulary import Vocabulary
from weft.model.generation.plan import NO_LOGPROBS
from weft.model.generation.request import Request, Token


@dataclass
class Answer:
    """One response: its identity, and the form of its choices.

    Attributes:
        chat: answers a chat, not a completion.
        echo: the prompts are part of the texts.
    """

    model: str
    requests: Sequence[Request]
    vocabulary: Vocabulary
    chat: bool
    echo: bool = False
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[str]) -> dict[str, Any]:
        """All choices, ended."""
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        return self._frame(choices, streamed=False) | {"usage": self.usage()}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with: the role of a chat, the prompts that are echoed."""
        pieces = []
        for index, request in enumerate(self.requests):
            if self.chat:
                pieces.append(self._piece({"index": index, "delta": {"role": "assistant", "content": ""}}))
            elif self.echo:
                logprobs = self._completion_logprobs(request, [], scores=True)
                text = self.vocabulary.decode(list(request.tokens))
                pieces.append(self._piece({"index": index, "text": text, "logprobs": logprobs}))
        return pieces

    def piece(self, event: Event) -> dict[str, Any]:
        """Something new in a stream."""
        tokens = [event.token] if event.token is not None else []
        request = self.requests[event.choice]
        choice: dict[str, Any] = {"index": event.choice, "finish_reason": event.finish}
        if self.chat:
            choice |= {"delta": {"content": event.text}, "logprobs": self._chat_logprobs(request, tokens)}
        else:
            choice |= {"text": event.text, "logprobs": self._completion_logprobs(request, tokens, scores=False)}
        return self._piece(choice)

    def last(self) -> dict[str, Any]:
        """The end of a stream that tells its usage."""
        return self._frame([], streamed=True) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompts = {id(request.tokens): len(request.tokens) for request in self.requests}
        prompt, completion = sum(prompts.values()), sum(len(request.generated) for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._frame([{"finish_reason": None, "logprobs": None} | choice], streamed=True)

    def _frame(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.identity}",
            "object": f"{kind}.chunk" if self.chat and streamed else kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        request = self.requests[index]
        choice: dict[str, Any] = {"index": index, "finish_reason": request.finish}
        if self.chat:
            message = {"role": "assistant", "content": text}
            return choice | {"message": message, "logprobs": self._chat_logprobs(request, request.generated)}
        if self.echo:
            text = self.vocabulary.decode(list(request.tokens)) + text
        logprobs = self._completion_logprobs(request, request.generated, scores=self.echo)
        return choice | {"text": text, "logprobs": logprobs}

    def _completion_logprobs(
        self, request: Request, tokens: Sequence[Token], *, scores: bool
    ) -> dict[str, list[Any]] | None:
        if request.top == NO_LOGPROBS:
            return None
        first = Token(request.tokens[0])  # nothing stands before it
        told = [first, *request.scores, *tokens] if scores else tokens
        names = [self.vocabulary.name(token.number) for token in told]
        offsets = [sum(map(len, names[:place])) for place in range(len(names))]
        tops = [self._named(token) if token.logprob is not None else None for token in told]
        values = [token.logprob for token in told]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _named(self, token: Token) -> dict[str, float]:
        """By their texts, of which two tokens may have the same: the likelier one is told."""
        named: dict[str, float] = {}
        for number, value in token.likeliest:
            named.setdefault(self.vocabulary.name(number), value)
        return named

    def _chat_logprobs(self, request: Request, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if request.top == NO_LOGPROBS:
            return None
        return {
            "content": [
                self._told(token.number, token.logprob)
                | {"top_logprobs": [self._told(number, value) for number, value in token.likeliest]}
                for token in tokens
            ]
        }

    def _told(self, number: int, logprob: float | None) -> dict[str, Any]:
        name = self.vocabulary.name(number)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}
