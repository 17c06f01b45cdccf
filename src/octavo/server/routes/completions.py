"""/v1/completions: texts that go on from prompts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.beam_params import BeamSearchParams
from octavo.core.outputs import CompletionOutput, RequestOutput
from octavo.core.params import SamplingParams
from octavo.server.answer_types import Completion
from octavo.server.answers import UsageCount, answer, answering, usage_of
from octavo.server.context import ServerContext
from octavo.server.errors import invalid
from octavo.server.fields import INTEGERS, SamplingFields, documented, integer
from octavo.server.generation import (
    Deadline,
    Generation,
    Piece,
    check_outputs,
    generation_of,
    names_of,
    prompts_of,
    tokenised,
)
from octavo.server.logprobs import CompletionLogprobs, joined, prompt_logprobs
from octavo.server.openapi import describes
from octavo.server.sampling import Params, params_of
from octavo.server.streams import DONE, event

router = APIRouter()

_STRINGS = {"type": "array", "items": {"type": "string"}}

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_TOLD = "text", "finish_reason", "logprobs", "token_ids", "prompt_token_ids"


class CompletionRequest(SamplingFields):
    """Continue one prompt or several."""

    prompt: Any = documented(
        "a text, token ids, or a list of these",
        {"anyOf": [{"type": "string"}, _STRINGS, INTEGERS, {"type": "array", "items": INTEGERS}]},
        ...,
    )
    max_tokens: Any = integer("most tokens to generate, 16 without; 0 with echo generates none", minimum=0)
    logprobs: Any = integer("log-probabilities of each token, and of so many best ones in its place", minimum=0)
    echo: bool | None = Field(None, description="begin each text with its prompt")


@router.post("/v1/completions", **describes(CompletionRequest, Completion, "Continue prompts", streams=True))
@answering(CompletionRequest)
async def completions(
    request: Request, context: ServerContext, body: CompletionRequest, deadline: Deadline
) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    params, nothing = _params(body, context)
    prompts, names = prompts_of(body.prompt, limits.max_prompts)
    check_outputs(params, len(prompts), limits.max_outputs)
    async with deadline.hold():
        tokens = await tokenised(context, prompts, names, body.cache_salt)
    work = generation_of(request, body, "cmpl", tokens, params, names_of(body))
    writer = _Writer(context, work, body, model, nothing)
    return await answer(context, work, deadline, writer, streams=bool(body.stream))


def _params(body: CompletionRequest, context: ServerContext) -> tuple[Params, bool]:
    """And whether nothing is to be generated: then one token is, and left out."""
    nothing = bool(body.echo) and type(body.max_tokens) is int and body.max_tokens == 0
    most = 1 if nothing else DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = params_of(body, context, {"max_tokens": most, "logprobs": body.logprobs})
    if body.echo and body.logprobs is not None:
        if isinstance(params, BeamSearchParams):
            raise invalid("logprobs", "is not for echo with use_beam_search")
        if params.prompt_logprobs is None:
            params = params.but(prompt_logprobs=params.logprobs)
        elif params.prompt_logprobs != params.logprobs:
            raise invalid("prompt_logprobs", "with echo, must be as many as logprobs")
    if nothing and isinstance(params, SamplingParams) and params.min_tokens:
        raise invalid("min_tokens", "is more than max_tokens=0")
    return params, nothing


class _Writer:
    """Outputs in the form of this route, as a whole or piece by piece."""

    def __init__(
        self, context: ServerContext, work: Generation, body: CompletionRequest, model: str, nothing: bool
    ) -> None:
        self._tokenizer = context.llm.tokenizer
        self._work = work
        self._params = work.params
        self._body = body
        self._nothing = nothing
        self._head = {
            "id": work.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": context.llm.system_fingerprint,
        }
        skips = self._params.skip_special_tokens
        self._skipped = self._tokenizer.special_token_ids if skips else frozenset()
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice
        self._begun: set[int] = set()  # choices
        self._usage = UsageCount(work.num_prompt_tokens)
        self._tells_usage = bool(body.stream_options and body.stream_options.include_usage)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        if self._nothing:
            outputs = [_without_tokens(one) for one in outputs]
        choices = [
            self._choice(number, output, one, whole=True)
            for number, output in enumerate(outputs)
            for one in output.outputs
        ]
        counted = usage_of(self._work.num_prompt_tokens, outputs)
        return {**self._head, "choices": choices, "usage": counted}

    def chunks(self, pieces: list[Piece]) -> bytes:
        if self._nothing:
            pieces = [(number, _without_tokens(output)) for number, output in pieces]
        self._usage.note(pieces)
        head = {**self._head, "usage": None} if self._tells_usage else self._head
        events = []
        for number, output in pieces:
            for one in output.outputs:
                choice = self._choice(number, output, one, whole=False)
                # What is held back, such as the beginning of a stop string, makes no chunk.
                if any(choice.get(name) for name in _TOLD):
                    events.append(event({**head, "choices": [choice]}))
        return b"".join(events)

    def last(self) -> bytes:
        told = event({**self._head, "choices": [], "usage": self._usage.as_dict()}) if self._tells_usage else b""
        return told + DONE

    def _choice(self, number: int, output: RequestOutput, one: CompletionOutput, *, whole: bool) -> dict[str, Any]:
        index = number * self._params.num_outputs + one.index
        before = self._prompt_text(number) if self._body.echo and index not in self._begun else ""
        choice = {
            "index": index,
            "text": before + one.text,
            "logprobs": self._logprobs_of(number, index, output, one),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = one.token_ids
            if index not in self._begun:
                choice["prompt_token_ids"] = self._work.prompts[number].token_ids
        if whole and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        self._begun.add(index)
        return choice

    def _prompt_text(self, number: int) -> str:
        prompt = self._work.prompts[number]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._params.skip_special_tokens)

    def _logprobs_of(
        self, number: int, index: int, output: RequestOutput, one: CompletionOutput
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None or one.logprobs is None:
            return None
        parts = []
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(0, self._skipped)
            if self._body.echo and output.prompt_logprobs is not None:
                parts = self._of_prompt(self._logprobs[index], number, output)
        parts.append(self._logprobs[index].of(one.token_ids, one.logprobs))
        return joined(parts)

    def _of_prompt(self, logprobs: CompletionLogprobs, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        token_ids = self._work.prompts[number].token_ids
        first, rows = token_ids[0], [row for row in output.prompt_logprobs or () if row is not None]
        text, spelt = self._tokenizer.spelling([first]), self._tokenizer.token_bytes(first)
        return [logprobs.first(first, text, spelt), logprobs.of(token_ids[1:], rows)]


def _without_tokens(output: RequestOutput) -> RequestOutput:
    outputs = [
        replace(one, text="", token_ids=[], logprobs=None if one.logprobs is None else [], finish_reason="length")
        for one in output.outputs
    ]
    return replace(output, outputs=[replace(one, stop_reason=None) for one in outputs])
