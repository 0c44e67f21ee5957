"""Errors as OpenAI's clients expect them."""

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse


class HttpError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one sentence with the key, the value and the remedy.
        key: the key of the body that it is about.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, key: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.key, self.code = status, key, code

    @property
    def content(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.key, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.status == 429:
            headers["retry-after"] = "1"
        if self.status in (408, 413):
            headers["connection"] = "close"  # what is still on its way is not read
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.content, self.status, headers)


def misfit(error: ValidationError) -> HttpError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    return HttpError(
        400, f"{key or 'the body'}: {first['msg']}; change or leave it out.", key=key, code="invalid_value"
    )
