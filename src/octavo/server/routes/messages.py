"""/v1/messages: Anthropic's route for answers, which coding agents speak."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import shown
from octavo.core.params import SamplingParams
from octavo.server.answer_types import AnthropicMessage, TokenCount
from octavo.server.answers import answer, answering
from octavo.server.anthropic_input import Turns, check_cache_control, use_of
from octavo.server.anthropic_output import MessageWriter
from octavo.server.chat_output import reader_for
from octavo.server.context import ServerContext
from octavo.server.conversation import Conversation, under_calls, write
from octavo.server.errors import JSONBytes, invalid, unknown_field
from octavo.server.fields import OBJECTS, Body, Draws, EngineFields, OutputParams, documented, sampling_fields
from octavo.server.generation import Deadline, generation_of
from octavo.server.messages import known_fields
from octavo.server.openapi import describes
from octavo.server.sampling import drawn, either_form, renamed

router = APIRouter()

_TEXT = {"anyOf": [{"type": "string"}, OBJECTS]}


class MessagesFields(Body):
    """A conversation in Anthropic's form."""

    neutral: ClassVar[Any] = {
        "container": ((), "is not supported: there is none"),
        "context_management": ((), "is not supported: nothing is taken out of a conversation"),
        "inference_geo": ((), "is not supported"),
        "mcp_servers": ((), "is not supported: the server calls nobody"),
        "service_tier": (("auto", "standard_only"), "is not supported: there is one, standard"),
        "speed": (("standard",), "is not supported: there is one, standard"),
        "stop": ((), "is called stop_sequences here"),
        "response_format": ((), "is called output_config.format here"),
        "thinking": (({"type": "disabled"},), 'must be {"type": "disabled"}: other values are not supported'),
    }

    messages: Any = documented(
        "objects with role and content, which is a text or blocks: text; of assistants also tool_use, of users "
        "tool_result. A last one of the assistant is gone on in",
        OBJECTS,
        ...,
    )
    system: Any = documented("a text or text blocks before the messages", _TEXT)
    tools: Any = documented("tools that the model may use: name, description, input_schema", OBJECTS)
    tool_choice: Any = documented(
        "an object of type auto, any, none, or tool with a name; with disable_parallel_tool_use", {"type": "object"}
    )
    output_config: Any = documented(
        'the answer\'s format: {"format": {"type": "json_schema", "schema": ...}}', {"type": "object"}
    )
    cache_control: Any = documented("without effect: prefixes are found without it", {"type": "object"})
    chat_template_kwargs: Any = documented("variables of the chat template", {"type": "object"})
    thinking: Any = documented("other values are not supported", {"enum": [{"type": "disabled"}, None]})
    service_tier: Any = documented("without effect", {"enum": ["auto", "standard_only", None]})


class MessagesRequest(MessagesFields, Draws, OutputParams, EngineFields):
    """Answer a conversation, in Anthropic's form."""

    max_tokens: Any = documented("most tokens to generate", {"type": "integer", "minimum": 1}, ...)
    stop_sequences: Any = documented("strings that end an output", {"type": "array", "items": {"type": "string"}})
    metadata: Any = documented("user_id; without effect", {"type": "object"})
    stream: bool | None = Field(None, description="answer with server-sent events, as tokens come")


class CountTokensRequest(MessagesFields):
    """Count the tokens of a conversation."""

    model: Any = documented("name of the model", {"type": "string"})


@router.post(
    "/v1/messages",
    **describes(MessagesRequest, AnthropicMessage, "Answer a conversation, in Anthropic's form", streams=True),
)
@answering(MessagesRequest)
async def messages(request: Request, context: ServerContext, body: MessagesRequest, deadline: Deadline) -> Response:
    model = context.model_named(body.model)
    params, names = _params(body, context)
    conversation = await asyncio.to_thread(_conversation, body, context)
    async with deadline.hold():
        prompt = await write(context, conversation)
    use = conversation.use
    params, more = under_calls(context, params, use, names["structured_outputs"])
    work = generation_of(request, body, "msg", [prompt], params, {**more, **names})
    writer = MessageWriter(work, model, reader_for(context.tool_format, use.names), request.scope)
    return await answer(context, work, deadline, writer, streams=bool(body.stream), failed=writer.failed)


@router.post(
    "/v1/messages/count_tokens", **describes(CountTokensRequest, TokenCount, "Count the tokens of a conversation")
)
@answering(CountTokensRequest)
async def count_tokens(
    request: Request, context: ServerContext, body: CountTokensRequest, deadline: Deadline
) -> Response:
    del request
    context.model_named(body.model)
    _format(body)
    conversation = await asyncio.to_thread(_conversation, body, context)
    async with deadline.hold():
        prompt = await write(context, conversation)
    return JSONBytes({"input_tokens": len(prompt.token_ids)})


def _conversation(body: MessagesFields, context: ServerContext) -> Conversation:
    limits = context.settings.limits
    check_cache_control("cache_control", body.cache_control)
    use = use_of(body.tools, body.tool_choice, limits)
    turns = Turns(body.system, body.messages, limits)
    last = turns.messages[-1]
    if turns.going_on and last.get("tool_calls"):
        raise invalid(turns.names[-1], "is the last one, and has tool_use blocks, whose results are to follow")
    return Conversation(
        messages=turns.messages,
        use=use,
        names=tuple(turns.names),
        chat_template_kwargs=body.chat_template_kwargs,
        continue_final_message=turns.going_on,
    )


def _params(body: MessagesRequest, context: ServerContext) -> tuple[SamplingParams, dict[str, str]]:
    """And what the request calls fields of the library's."""
    known_fields("metadata", body.metadata or {}, ["user_id"], "an object with user_id")
    stops = body.stop_sequences
    if not isinstance(stops, list | None):
        raise invalid("stop_sequences", f"must be a list of strings, not {shown(stops)}")
    schema, field = _format(body), "output_config.format"
    form = None if schema is None else {"json": schema}
    form, name = either_form(field, form, f"{field}.schema", body.structured_outputs)
    given = {**sampling_fields(body), "stop": stops, "structured_outputs": form}
    names = {"structured_outputs": name, "stop": "stop_sequences"}
    with renamed(names):
        return drawn(given, context, streamed=bool(body.stream)), names


def _format(body: MessagesFields) -> Any:
    """The schema of the answer."""
    if body.output_config is None:
        return None
    config = known_fields("output_config", body.output_config, ["format"], "an object with a format")
    if "format" not in config:
        return None
    name = "output_config.format"
    form = known_fields(name, config["format"], ["type", "schema"], 'an object {"type": "json_schema", "schema": ...}')
    if form.get("type") != "json_schema":
        raise invalid(f"{name}.type", f"must be json_schema, not {shown(form.get('type'))}")
    if "schema" not in form:
        raise invalid(f"{name}.schema", "is missing")
    if unknown := form.keys() - {"type", "schema"}:
        raise unknown_field(name, unknown, ["type", "schema"])
    return form["schema"]
