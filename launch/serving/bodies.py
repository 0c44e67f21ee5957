"""What clients may ask, as OpenAI's protocol has it. Keys that change nothing here are ignored; others are refused."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_LOGPROBS = 20
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class Body(BaseModel):
    """What completions and chats have in common; `top_k`, `min_p` and `repetition_penalty` are not OpenAI's.

    Attributes:
        seed: makes the answer repeatable; drawn anew for each request when left out.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))


class CompletionBody(Body):
    """A text, several, or their tokens, to go on with."""

    prompt: str | Annotated[list[str] | list[Token] | list[list[Token]], Field(min_length=1, max_length=256)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class Message(BaseModel):
    """One turn of a chat; content is text or a list of parts of text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Annotated[str, Field(max_length=64)]
    content: str | list[dict[str, Any]]

    @model_validator(mode="after")
    def _only_text(self) -> Self:
        if not isinstance(self.content, str):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError('only parts of {"type": "text", "text": …} are understood')
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)


class ChatBody(Body):
    """A chat to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
