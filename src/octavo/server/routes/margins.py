"""/v1/octavo/margins: a document read with notes in its margins (docs/margins.md), and what a reviewer says to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, NamedTuple

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.margins_params import MarginsParams
from octavo.margins import AsyncMarginsRun
from octavo.server.answer_types import Margins, Status
from octavo.server.answers import Work, answering, body_of, route
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError, JSONBytes, invalid
from octavo.server.events import margins_json, typed_answer
from octavo.server.fields import Body, RequestFields, documented, flag, integer, number
from octavo.server.generation import Deadline, unique_id
from octavo.server.openapi import describes
from octavo.server.sampling import changed
from octavo.server.settings import Limits
from octavo.server.streams import event, unless_gone

router = APIRouter()

PATH = "/v1/octavo/margins"
_DIRECT = (  # fields that are those of MarginsParams
    "segment_tokens",
    "classification",
    "threshold",
    "early_exit_kept",
    "early_exit_score",
    "overlap",
    "review",
    "windows",
    "apply_chat_template",
    "prompts",
    "seed",
)
_SAMPLING = "as fields of SamplingParams; what is not given is as in the library"


class MarginsFields(Body):
    """How to read a document."""

    segment_tokens: Any = integer("most tokens of a segment, 1024 without", minimum=1)
    margin: Any = documented(f"how notes are drawn, {_SAMPLING}: greedy, at most 100 tokens", {"type": "object"})
    classification: Any = documented(
        "how the model says whether a note is relevant", {"type": "string", "enum": ["score", "text", "merged"]}
    )
    threshold: Any = number("with score: keep a note if log p(YES) - log p(NO) is more")
    early_exit_kept: Any = integer("read no further when so many notes were kept", minimum=1)
    early_exit_score: Any = number("read no further after a note with at least this score")
    overlap: Any = flag("read on while notes are written; the default")
    windows: Any = flag("read a document that is longer than the context in parts")
    prompts: Any = documented("texts around document, notes and question: fields of MarginsPrompts", {"type": "object"})


class MarginsRequest(MarginsFields, RequestFields):
    """Read a document with notes in its margins."""

    null_is_a_value: ClassVar[frozenset[str]] = frozenset(["answer"])

    document: Any = documented("what to read", {"type": "string"}, ...)
    question: Any = documented(
        "what to answer, or a list of several",
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        ...,
    )
    answer: Any = documented(
        f"how the answer is drawn, {_SAMPLING}: greedy, at most 256 tokens; null: none is", {"type": "object"}
    )
    review: Any = flag("wait for a person's verdicts before the answer; needs stream")
    apply_chat_template: Any = flag("put the chat template around; if there is one without")
    chat_template_kwargs: Any = documented("variables of the chat template", {"type": "object"})
    seed: Any = integer("of all draws", minimum=0)
    stream: bool | None = Field(None, description="tell what happens as server-sent events with types")


class VerdictRequest(Body):
    """Which note is judged."""

    segment: Any = integer("the number of its segment", minimum=0)
    question: Any = integer("the number of its question, 0 without", minimum=0)


class EditRequest(VerdictRequest):
    """Which note is to have which words."""

    text: Any = documented("the words", {"type": "string"}, ...)


class NothingRequest(Body):
    """An empty object."""


class _Review(NamedTuple):
    """A run whose notes may be judged, by those with the key that began it."""

    run: AsyncMarginsRun
    key: bytes | None


def margins_params(body: MarginsFields, limits: Limits) -> dict[str, Any]:
    """Fields of MarginsParams. Raises ApiError, InvalidRequestError."""
    given = {name: getattr(body, name) for name in body.model_fields_set if name in _DIRECT}
    if body.margin is not None:
        given["margin"] = changed("margin", body.margin, MarginsParams().margin, limits)
    return given


@router.post(
    PATH,
    **describes(MarginsRequest, Margins, "Read a document with notes in its margins", streams=True),
)
@answering(MarginsRequest)
async def margins(request: Request, context: ServerContext, body: MarginsRequest, deadline: Deadline) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    given = margins_params(body, limits)
    if "answer" in body.model_fields_set:
        default = MarginsParams().answer
        given["answer"] = None if body.answer is None else changed("answer", body.answer, default, limits)
    params = MarginsParams(**given)
    if params.review and not body.stream:
        raise invalid("review", "needs stream, which tells what there is to judge")
    identity = unique_id(request, body.request_id, "margins", limits.max_request_id)
    async with deadline.hold():
        run = await context.llm.margins(
            body.document,
            body.question,
            params,
            identity,
            chat_template_kwargs=body.chat_template_kwargs,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
    head = {"id": identity, "object": "octavo.margins", "model": model}
    work = _read(context, run, deadline, request.scope["octavo.key"])
    begun = event({"type": "begun", **head, "segments": run.segments}, "begun")
    return await typed_answer(context, head, work, margins_json, streams=bool(body.stream), begun=begun)


def _read(context: ServerContext, run: AsyncMarginsRun, deadline: Deadline, key: bytes | None) -> Work:
    async def work(put: Callable[[Any], None]) -> None:
        async with deadline.hold():
            with context.admission.admit(1, run.segments[-1].last_token):
                if run.request_id in context.runs:
                    raise invalid("request_id", "is that of another document that is being read")
                context.runs[run.request_id] = _Review(run, key)
                try:
                    async with run:
                        async for told in run:
                            put(told)
                finally:
                    del context.runs[run.request_id]

    return work


# --- what a reviewer says ---


def _say(verb: str, kind: type[Body], summary: str, say: Callable[[AsyncMarginsRun, Any], Awaitable[None]]) -> None:
    @router.post(f"{PATH}/{{run_id}}/{verb}", name=verb, **describes(kind, Status, summary))
    @route
    async def endpoint(request: Request, context: ServerContext) -> Response:
        body = await body_of(request, context, kind)
        found = context.runs.get(request.path_params["run_id"])
        if found is None or found.key != request.scope["octavo.key"]:
            raise ApiError(404, "no such document is being read", "id")
        await unless_gone(request, _await(say(found.run, body)))
        return JSONBytes({"status": "ok"})


async def _await(said: Awaitable[None]) -> None:
    await asyncio.ensure_future(said)


def _where(body: VerdictRequest) -> tuple[Any, Any]:
    if body.segment is None:
        raise invalid("segment", "is missing")
    return body.segment, 0 if body.question is None else body.question


def _accept(run: AsyncMarginsRun, body: VerdictRequest) -> Awaitable[None]:
    return run.accept(*_where(body))


def _reject(run: AsyncMarginsRun, body: VerdictRequest) -> Awaitable[None]:
    return run.reject(*_where(body))


def _edit(run: AsyncMarginsRun, body: EditRequest) -> Awaitable[None]:
    segment, question = _where(body)
    return run.edit(segment, body.text, question)


_say("accept", VerdictRequest, "Keep a note, whatever the model said", _accept)
_say("reject", VerdictRequest, "Leave a note out", _reject)
_say("edit", EditRequest, "Keep a note with other words", _edit)
_say("answer_now", NothingRequest, "Review no more", lambda run, _: run.answer_now())
_say("stop_reading", NothingRequest, "Read no further", lambda run, _: run.stop_reading())
