"""/v1/octavo/ask: a question over documents that come with it, answered with citations (docs/documents.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.ask import AsyncAskRun
from octavo.core.ask_params import AskParams
from octavo.core.errors import shown
from octavo.core.margins_params import MarginsParams
from octavo.server.answer_types import Ask
from octavo.server.answers import Work, answering
from octavo.server.context import ServerContext
from octavo.server.errors import invalid
from octavo.server.events import ask_json, typed_answer
from octavo.server.fields import RequestFields, documented, flag, integer, parsed
from octavo.server.generation import Deadline, unique_id
from octavo.server.openapi import describes
from octavo.server.routes.margins import MarginsFields, margins_params
from octavo.server.sampling import changed, inside
from octavo.server.settings import Limits

router = APIRouter()

_DIRECT = (  # fields that are those of AskParams
    "num_passages",
    "passage_tokens",
    "order",
    "num_documents",
    "apply_chat_template",
    "prompts",
    "seed",
)
_DOCUMENT = {
    "type": "object",
    "required": ["text"],
    "properties": {"id": {"type": "string"}, "title": {"type": "string"}, "text": {"type": "string"}},
}


class AskRequest(RequestFields):
    """Answer a question from documents."""

    question: Any = documented("what to answer", {"type": "string"}, ...)
    documents: Any = documented("what the answer may rest on", {"type": "array", "items": _DOCUMENT}, ...)
    num_passages: Any = integer("most passages in the prompt, 8 without", minimum=1)
    passage_tokens: Any = integer("most tokens of a passage, 256 without")
    order: Any = documented(
        "of passages in the prompt: that of the documents, or of what is cached most",
        {"type": "string", "enum": ["document", "cache"]},
    )
    answer: Any = documented("how the answer is drawn, as fields of SamplingParams", {"type": "object"})
    margins: Any = documented("read whole documents with notes in their margins: how", {"type": "object"})
    num_documents: Any = integer("most documents that margins read, 4 without", minimum=1)
    apply_chat_template: Any = flag("put the chat template around; if there is one without")
    chat_template_kwargs: Any = documented("variables of the chat template", {"type": "object"})
    prompts: Any = documented("texts around passages and question: fields of AskPrompts", {"type": "object"})
    seed: Any = integer("of all draws", minimum=0)
    stream: bool | None = Field(None, description="tell what happens as server-sent events with types")


def _params(body: AskRequest, limits: Limits) -> AskParams:
    given = {name: getattr(body, name) for name in body.model_fields_set if name in _DIRECT}
    if body.answer is not None:
        given["answer"] = changed("answer", body.answer, AskParams().answer, limits)
    if body.margins is not None:
        if not isinstance(body.margins, dict):
            raise invalid("margins", f"must be an object, not {shown(body.margins)}")
        with inside("margins"):
            given["margins"] = MarginsParams(**margins_params(parsed(MarginsFields, body.margins), limits))
    return AskParams(**given)


@router.post("/v1/octavo/ask", **describes(AskRequest, Ask, "Answer a question from documents", streams=True))
@answering(AskRequest)
async def ask(request: Request, context: ServerContext, body: AskRequest, deadline: Deadline) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    params = _params(body, limits)
    identity = unique_id(request, body.request_id, "ask", limits.max_request_id)
    async with deadline.hold():
        run = await context.llm.ask(
            body.question,
            None,
            params,
            identity,
            documents=body.documents,
            chat_template_kwargs=body.chat_template_kwargs,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
    head = {"id": identity, "object": "octavo.ask", "model": model}
    return await typed_answer(context, head, _run(context, run, deadline), ask_json, streams=bool(body.stream))


def _run(context: ServerContext, run: AsyncAskRun, deadline: Deadline) -> Work:
    async def work(put: Callable[[Any], None]) -> None:
        # How many tokens it takes is known when passages were found: it counts as one context, which is the most.
        async with deadline.hold():
            with context.admission.admit(1, context.llm.max_model_len):
                async with run:
                    async for told in run:
                        put(told)

    return work
