"""From the bodies of clients to texts to generate."""

import asyncio
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft.launch.serving.bodies import Body, ChatBody, CompletionBody
from weft.launch.serving.problems import HttpError
from weft.launch.serving.service import Service
from weft.launch.vocabulary import Vocabulary
from weft.model.generation.plan import NO_LOGPROBS
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling

COMPLETION_TOKENS = 16  # of OpenAI's protocol, where a body does not say


async def completion_requests(body: CompletionBody, service: Service, vocab_size: int) -> list[Request]:
    """A request for each choice of each prompt, in the order of the choices' numbers.

    Raises:
        HttpError: a prompt is too long, or holds what is no token.
    """
    _check_model(body, service)
    prompts = [await _tokens(prompt, service.vocabulary, vocab_size) for prompt in body.prompts]
    top = NO_LOGPROBS if body.logprobs is None else body.logprobs
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _requests(body, prompts, wanted, top, service, score=body.echo and top >= 0)


async def chat_requests(body: ChatBody, service: Service) -> list[Request]:
    """A request for each choice.

    Raises:
        HttpError: the model has no chat template, it refuses the messages, or they are too long.
    """
    _check_model(body, service)
    text = chat_prompt(body, service.vocabulary)
    prompt = await asyncio.to_thread(_encode_chat, text, service.vocabulary)
    top = (body.top_logprobs or 0) if body.logprobs else NO_LOGPROBS
    wanted = service.limits.context - len(prompt) if body.most_tokens is None else body.most_tokens
    return _requests(body, [prompt], min(wanted, service.limits.new_tokens), top, service, score=False)


def chat_prompt(body: ChatBody, vocabulary: Vocabulary) -> str:
    """The messages as the model's chat template writes them; the template runs in Jinja's sandbox.

    Raises:
        HttpError: there is no template, or it fails.
    """
    if vocabulary.chat_template is None:
        raise HttpError(400, "the model has no chat template; ask /v1/completions instead.", code="no_chat_template")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        template = environment.from_string(vocabulary.chat_template)
        return template.render(messages=messages, add_generation_prompt=True, **vocabulary.special_texts)
    except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise HttpError(400, f"messages: the chat template refuses them: {error}.", key="messages") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _encode_chat(text: str, vocabulary: Vocabulary) -> list[int]:
    _check_text(text, "messages")
    # the template has written the special tokens
    tokens: list[int] = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    return tokens or [vocabulary.end]


def _check_model(body: Body, service: Service) -> None:
    if body.model != service.name:
        raise HttpError(
            404,
            f"model {body.model!r} is not served here; ask for {service.name!r}.",
            key="model",
            code="model_not_found",
        )


async def _tokens(prompt: str | list[int], vocabulary: Vocabulary, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
        return await asyncio.to_thread(vocabulary.encode, prompt)
    if not prompt or max(prompt) >= vocab_size:
        raise HttpError(400, f"prompt: tokens are numbers below {vocab_size}, and at least one of them.", key="prompt")
    return prompt


def _check_text(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise HttpError(400, f"{key}: it holds half a surrogate pair, which is no character.", key=key) from None


def _requests(
    body: Body, prompts: Sequence[list[int]], wanted: int, top: int, service: Service, *, score: bool
) -> list[Request]:
    limits = service.limits
    if wanted > limits.new_tokens:
        raise HttpError(
            400, f"max_tokens is {wanted}; this server generates {limits.new_tokens} at most.", key="max_tokens"
        )
    for prompt in prompts:
        if len(prompt) + max(wanted, 1) > limits.context:
            raise HttpError(
                400,
                f"the prompt has {len(prompt)} tokens and {wanted} new ones are asked for, but a text may have "
                f"{limits.context}; shorten it.",
                code="context_length_exceeded",
            )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    options = _options(body)
    return [
        Request(
            prompt,
            wanted,
            Sampling(**options, seed=seed + choice),
            service.vocabulary.stop_tokens,
            top=top,
            score=score,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]


def _options(body: Body) -> dict[str, Any]:
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    return {name: getattr(body, name) for name in names}
