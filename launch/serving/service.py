"""Between the event loop, where requests come in, and the driver's thread, where they are computed."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from weft.launch.serving.meters import Meters
from weft.launch.serving.problems import HttpError
from weft.launch.signals import StopRequest
from weft.launch.text_stream import TextStream
from weft.launch.vocabulary import Vocabulary
from weft.model.generation.driver import Session
from weft.model.generation.request import Finish, Request, Token

IDLE_SECONDS = 0.25
SILENCE_SECONDS = 30.0


class Event(NamedTuple):
    """Something new of the choice of that number: text, the token that it came with, the reason of its end."""

    choice: int
    text: str
    token: Token | None
    finish: Finish | None


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        texts: computed at a time.
        queue: texts that wait beyond that; more are refused.
        context: tokens of a text, its prompt included.
        new_tokens: of one text.
        body: bytes of a request.
        body_seconds: for a client to send its request.
    """

    texts: int
    queue: int
    context: int
    new_tokens: int
    body: int = 1 << 20
    body_seconds: float = 20.0


class Service:
    """Takes texts to generate, and hands on what becomes of them.

    `drive` runs on the thread that owns the session; all else on the event loop.
    """

    def __init__(self, name: str, vocabulary: Vocabulary, limits: Limits, meters: Meters) -> None:
        self.name, self.vocabulary, self.limits, self.meters = name, vocabulary, limits, meters
        self.created = int(time.time())
        self.pending = 0
        self.stopping = False
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._alive = time.monotonic()

    @property
    def healthy(self) -> bool:
        """Whether the driver takes turns."""
        return not self.stopping and time.monotonic() - self._alive < SILENCE_SECONDS

    async def run(self, requests: Sequence[Request], stops: Sequence[str]) -> AsyncIterator[Event]:
        """What becomes of each request, as it happens; one that is left before its end is cancelled.

        Raises:
            HttpError: too many texts wait already, or the server is stopping.
        """
        if self.stopping:
            raise HttpError(503, "the server is stopping; ask another one.", code="stopping")
        if self.pending + len(requests) > self.limits.texts + self.limits.queue:
            self.meters.refused.inc()
            raise HttpError(
                429, f"{self.pending} texts are computed or wait already; try again later.", code="rate_limit_exceeded"
            )
        self.pending += len(requests)
        started = time.monotonic()
        try:
            events = self._submit(requests, stops)
            open_texts = len(requests)
            while open_texts:
                event = await events.get()
                if event.token is not None and started:
                    self.meters.first_token.observe(time.monotonic() - started)
                    started = 0.0
                open_texts -= event.finish is not None
                yield event
        finally:
            self.pending -= len(requests)
            for request in requests:
                request.cancelled = True
                self.meters.count(request)

    def _submit(self, requests: Sequence[Request], stops: Sequence[str]) -> "asyncio.Queue[Event]":
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        for index, request in enumerate(requests):
            stream = TextStream(self.vocabulary.tokenizer, request.tokens, stops)

            def watch(request: Request, index: int = index, stream: TextStream = stream) -> bool:
                token = None if request.finish else request.generated[-1]
                text = stream.finish() if token is None else stream.push(token.number)
                with suppress(RuntimeError):  # the loop is closed when the server stops
                    loop.call_soon_threadsafe(events.put_nowait, Event(index, text, token, request.finish))
                return stream.stopped

            request.watch = watch
            self._inbox.put(request)
        return events

    def drive(self, session: Session, stop: StopRequest) -> None:
        """Compute what comes in, until asked to stop; what is not done by then ends as cancelled."""
        quiet_since = time.monotonic()
        while stop.requested is None:
            self._alive = time.monotonic()
            self._take_in(session)
            self.meters.active.set(session.scheduler.active)
            self.meters.waiting.set(len(session.scheduler.waiting))
            if not session.scheduler.idle:
                session.advance()
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > session.worker.timeout / 4:
                session.keep_alive()
                quiet_since = time.monotonic()
        self.stopping = True
        self._take_in(session)
        session.scheduler.cancel_all()
        while not session.scheduler.idle:
            session.advance()

    def _take_in(self, session: Session) -> None:
        with suppress(queue.Empty):
            if session.scheduler.idle:
                session.scheduler.submit(self._inbox.get(timeout=IDLE_SECONDS))
            while True:
                session.scheduler.submit(self._inbox.get_nowait())
