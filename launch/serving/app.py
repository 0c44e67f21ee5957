"""The server's routes: completions, chats, the model's name, health, metrics, and a page to try it on."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from weft.launch.serving.answers import Answer
from weft.launch.serving.bodies import Body, ChatBody, CompletionBody
from weft.launch.serving.problems import HttpError, misfit
from weft.launch.serving.requests import chat_requests, completion_requests
from weft.launch.serving.service import Service

AnyBody = TypeVar("AnyBody", bound=Body)
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "testserver"]


class Api:
    """The endpoints of one service.

    Args:
        token: what clients must send as `Authorization: Bearer …`; None lets everybody in.
    """

    def __init__(self, service: Service, vocab_size: int, token: str | None) -> None:
        self.service, self.vocab_size, self.token = service, vocab_size, token

    def application(self, *, loopback: bool) -> Starlette:
        """The ASGI application; bound to loopback it answers to local names alone, against pages that rebind theirs."""
        routes = [
            Route("/", self._told(self.page)),
            Route("/health", self._told(self.health)),
            Route("/metrics", self._told(self.metrics, guarded=True)),
            Route("/v1/models", self._told(self.models, guarded=True)),
            Route("/v1/models/{name:path}", self._told(self.model, guarded=True)),
            Route("/v1/completions", self._told(self.complete, guarded=True), methods=["POST"]),
            Route("/v1/chat/completions", self._told(self.chat, guarded=True), methods=["POST"]),
        ]
        guards = [Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)] if loopback else []
        return Starlette(routes=routes, middleware=guards, exception_handlers={HTTPException: _http_problem})

    async def page(self, request: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: HttpRequest) -> Response:
        healthy = self.service.healthy
        return JSONResponse({"status": "ok" if healthy else "stuck"}, 200 if healthy else 503)

    async def metrics(self, request: HttpRequest) -> Response:
        return Response(generate_latest(self.service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self.service.name:
            raise HttpError(404, f"model {name!r} is not served here.", key="model", code="model_not_found")
        return JSONResponse(self._model())

    async def complete(self, request: HttpRequest) -> Response:
        body = await self._body(request, CompletionBody)
        wanted = await completion_requests(body, self.service, self.vocab_size)
        answer = Answer(self.service.name, wanted, self.service.vocabulary, chat=False, echo=body.echo)
        return await self._answer(request, body, answer)

    async def chat(self, request: HttpRequest) -> Response:
        body = await self._body(request, ChatBody)
        wanted = await chat_requests(body, self.service)
        return await self._answer(request, body, Answer(self.service.name, wanted, self.service.vocabulary, chat=True))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "weft",
            "max_model_len": self.service.limits.context,
            "chat": self.service.vocabulary.chat_template is not None,
        }

    def _told(
        self, endpoint: Callable[[HttpRequest], Awaitable[Response]], *, guarded: bool = False
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """An endpoint whose problems become answers, and whose answers are counted."""

        async def counted(request: HttpRequest) -> Response:
            try:
                if guarded:
                    self._check_token(request)
                response = await endpoint(request)
            except HttpError as problem:
                response = problem.response()
            path = request.scope["route"].path
            self.service.meters.responses.labels(path, response.status_code).inc()
            return response

        return counted

    def _check_token(self, request: HttpRequest) -> None:
        given = request.headers.get("authorization", "")
        if self.token and not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise HttpError(
                401, "the bearer token is missing or wrong; send Authorization: Bearer TOKEN.", code="token"
            )

    async def _body(self, request: HttpRequest, kind: type[AnyBody]) -> AnyBody:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HttpError(415, "the body must be JSON; send Content-Type: application/json.")
        try:
            async with asyncio.timeout(self.service.limits.body_seconds):
                content = await self._read(request)
        except TimeoutError:
            raise HttpError(408, f"the body did not come within {self.service.limits.body_seconds:g} s.") from None
        except ClientDisconnect:
            raise HttpError(400, "the client left before its request was whole.") from None
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            raise HttpError(400, "the body is not JSON in UTF-8; send an object.") from None
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise misfit(error) from None

    async def _read(self, request: HttpRequest) -> bytes:
        """The body; one that is too large is read to its end and dropped, or its client would not read the answer."""
        content, size, limit = bytearray(), 0, self.service.limits.body
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                content += part
        if size > limit:
            raise HttpError(413, f"the body is larger than {limit:,} bytes; send less at a time.", code="too_large")
        return bytes(content)

    async def _answer(self, request: HttpRequest, body: Body, answer: Answer) -> Response:
        events = self.service.run(answer.requests, body.stops)
        if body.stream:
            first = await anext(events)  # what is refused must be so before the stream begins
            return StreamingResponse(
                self._stream(events, first, body, answer),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        texts = await _unless_gone(request, _collect(events, answer.requests))
        if any(wanted.finish == "cancelled" for wanted in answer.requests):
            raise HttpError(503, "the server is stopping; ask another one.", code="stopping")
        return JSONResponse(answer.whole(texts))

    async def _stream(self, events: AsyncIterator[Any], first: Any, body: Body, answer: Answer) -> AsyncIterator[str]:
        try:
            for piece in answer.first():
                yield _sent(piece)
            yield _sent(answer.piece(first))
            async for event in events:
                yield _sent(answer.piece(event))
            if body.tells_usage:
                yield _sent(answer.last())
            yield "data: [DONE]\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # its texts are cancelled if they go on


async def _collect(events: AsyncIterator[Any], requests: Any) -> list[str]:
    texts: list[list[str]] = [[] for _ in requests]
    async for event in events:
        texts[event.choice].append(event.text)
    return ["".join(parts) for parts in texts]


async def _unless_gone(request: HttpRequest, work: Any) -> list[str]:
    """The result of the work, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HttpError(499, "the client left before its answer.")
        result: list[str] = tasks[0].result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _http_problem(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()
