"""Prompts on their way through the engine: tokenised, admitted, answered side by side, and ended in time."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import shown
from octavo.core.outputs import RequestOutput, joined_outputs
from octavo.server.context import ServerContext, context_of
from octavo.server.errors import ApiError, invalid
from octavo.server.fields import RequestFields, SamplingFields
from octavo.server.sampling import Params, renamed, written_as

_ID = re.compile(r"[A-Za-z0-9._:-]+")
_LONGEST_TIMEOUT = 86400.0  # seconds that a request may ask for

Deliver = Callable[[int, RequestOutput], None]  # number of the prompt, what is new of it


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt, tokenised and checked against the model."""

    text: str | None  # as it was given, or as the chat template wrote it; None: token ids alone were given
    token_ids: list[int]
    name: str  # what the request calls it, for errors


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request asks of the engine."""

    id: str  # of the answer
    engine_ids: tuple[str, ...]  # one a prompt
    prompts: tuple[PromptTokens, ...]
    params: Params
    priority: int = 0
    cache_salt: str | None = None
    names: dict[str, str] = field(default_factory=dict)  # the library's name of a field -> the request's

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.prompts)


class Deadline:
    """By when a request must be answered: the server's setting, or sooner by the header X-Request-Timeout, in seconds.

    Raises ApiError for a header that is none.
    """

    def __init__(self, request: Request, context: ServerContext) -> None:
        seconds = context.settings.request_timeout
        given = request.headers.get("x-request-timeout")
        if given is not None:
            asked = _seconds(given)
            seconds = asked if seconds is None else min(seconds, asked)
        self._at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Raises ApiError (504) when it is over."""
        try:
            async with asyncio.timeout_at(self._at) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise ApiError(504, "the request was not answered in time") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        problem = f"must be a number of seconds, at most {_LONGEST_TIMEOUT:g}, not {shown(text)}"
        raise invalid("X-Request-Timeout", problem)
    return seconds


# --- identity ---


def answer_id(request: Request, given: object, kind: str, limits_chars: int) -> tuple[str, bool]:
    """The id of an answer, ``kind-...``: by the body's request_id, the header X-Request-Id, or new. And whether the
    client chose it in the body, so that it must be the only one of its kind. Raises ApiError."""
    if given is None:
        return f"{kind}-{request.scope['octavo.request_id']}", False
    if not isinstance(given, str) or len(given) > limits_chars or not _ID.fullmatch(given):
        problem = f"must be 1 to {limits_chars} of the characters A-Z a-z 0-9 . _ : -, not {shown(given)}"
        raise invalid("request_id", problem)
    return f"{kind}-{given}", True


def engine_ids(identity: str, chosen: bool, count: int) -> tuple[str, ...]:
    """One a prompt. A header may come with several requests at once: it names, and need not tell them apart."""
    suffix = "" if chosen else "-" + secrets.token_hex(4)
    return tuple(f"{identity}-{number}{suffix}" for number in range(count))


def unique_id(request: Request, given: object, kind: str, limits_chars: int) -> str:
    """The id of a run, which routes name and no other has."""
    identity, chosen = answer_id(request, given, kind, limits_chars)
    return identity if chosen else f"{identity}-{secrets.token_hex(4)}"


def generation_of(
    request: Request,
    body: RequestFields,
    kind: str,
    prompts: Sequence[PromptTokens],
    params: Params,
    names: dict[str, str] | None = None,
) -> Generation:
    """What a request asks of the engine, for an answer with an id of this kind. Raises ApiError."""
    limits = context_of(request).settings.limits
    identity, chosen = answer_id(request, body.request_id, kind, limits.max_request_id)
    ids = engine_ids(identity, chosen, len(prompts))
    return Generation(identity, ids, tuple(prompts), params, body.priority, body.cache_salt, names or {})


# --- prompts ---


async def tokenised(
    context: ServerContext, prompts: Sequence[Any], names: Sequence[str], salt: object
) -> tuple[PromptTokens, ...]:
    """Texts and lists of token ids, checked against the model, with the lengths and names that errors tell. Raises
    InvalidRequestError."""
    found = []
    for prompt, name in zip(prompts, names, strict=True):
        given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        if salt is not None:
            given["cache_salt"] = salt
        with renamed({"prompt": name, "prompt_token_ids": name}):
            token_ids, _ = await asyncio.to_thread(context.llm._frontend.cache_key, given)
        found.append(PromptTokens(prompt if isinstance(prompt, str) else None, token_ids, name))
    return tuple(found)


def prompts_of(value: object, most: int, name: str = "prompt") -> tuple[list[Any], list[str]]:
    """The four forms of OpenAI's fields `prompt` and `input`, as a list of texts and of lists of token ids; and what
    errors call each. Raises ApiError."""
    if isinstance(value, str):
        return [value], [name]
    if not isinstance(value, list):
        problem = "must be a string, a list of strings, a list of token ids, or a list of such lists"
        raise invalid(name, f"{problem}, not {shown(value)}")
    if not value:
        raise invalid(name, "is empty")
    if isinstance(value[0], int | float):
        return [value], [name]
    if len(value) > most:
        raise invalid(name, f"may have at most {most} prompts, not {len(value)}")
    for number, one in enumerate(value):
        if not isinstance(one, str | list):
            raise invalid(f"{name}[{number}]", f"must be a string or a list of token ids, not {shown(one)}")
    return value, [f"{name}[{number}]" for number in range(len(value))]


# --- answers ---


async def generate(context: ServerContext, work: Generation, deadline: Deadline, deliver: Deliver) -> None:
    """Answer all prompts side by side. Raises ApiError, InvalidRequestError, and what the engine raises; all of them
    end then."""
    async with deadline.hold():
        with context.admission.admit(len(work.prompts), work.num_prompt_tokens):
            if len(work.prompts) == 1:
                await _one(context, work, 0, deliver)
                return
            async with asyncio.TaskGroup() as group:
                for number in range(len(work.prompts)):
                    group.create_task(_one(context, work, number, deliver))


async def _one(context: ServerContext, work: Generation, number: int, deliver: Deliver) -> None:
    prompt, params, llm = work.prompts[number], work.params, context.llm
    given: dict[str, Any] = {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids}
    if work.cache_salt is not None:
        given["cache_salt"] = work.cache_salt
    identity = work.engine_ids[number]
    with renamed({"prompt": prompt.name, "prompt_token_ids": prompt.name, **work.names}):
        if isinstance(params, BeamSearchParams):
            outputs = llm.beam_search(given, params, identity, priority=work.priority)
        else:
            outputs = llm.generate(given, params, identity, priority=work.priority)
        async with aclosing(outputs):
            async for output in outputs:
                deliver(number, output)


async def answered(context: ServerContext, work: Generation, deadline: Deadline) -> list[RequestOutput]:
    """The final outputs, in the order of the prompts."""
    found: dict[int, RequestOutput] = {}

    def deliver(number: int, output: RequestOutput) -> None:
        found[number] = output

    await generate(context, work, deadline, deliver)
    return [found[number] for number in range(len(work.prompts))]


def check_outputs(work_params: Params, prompts: int, most: int) -> None:
    """Raises ApiError."""
    if work_params.num_outputs * prompts > most:
        problem = f"{work_params.num_outputs} outputs of {prompts} prompts are more than {most}"
        raise invalid("n", problem)


def names_of(body: SamplingFields) -> dict[str, str]:
    """What a request calls fields of the library's."""
    names = {"structured_outputs": written_as(body)}
    return {**names, "beam_width": "n"} if body.use_beam_search else names


# --- streams ---

Piece = tuple[int, RequestOutput]


def merged(earlier: Piece, new: Piece) -> Piece | None:
    """Two pieces of one prompt as one."""
    if earlier[0] != new[0]:
        return None
    outputs = {one.index: one for one in earlier[1].outputs}
    for one in new[1].outputs:
        before = outputs.get(one.index)
        outputs[one.index] = one if before is None else joined_outputs(before, one)
    return new[0], replace(new[1], outputs=[outputs[index] for index in sorted(outputs)])
