"""/v1/responses: OpenAI's newer route for answers; of it what needs nothing to be kept."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import shown
from octavo.core.params import SamplingParams
from octavo.server.answer_types import ModelResponse
from octavo.server.answers import answer, answering
from octavo.server.chat_output import reader_for
from octavo.server.context import ServerContext
from octavo.server.conversation import Conversation, under_calls, write
from octavo.server.errors import invalid, unknown_field
from octavo.server.fields import OBJECTS, Body, DrawParams, EngineFields, documented, integer, sampling_fields, text
from octavo.server.generation import Deadline, generation_of
from octavo.server.messages import ToolUse
from octavo.server.openapi import describes
from octavo.server.responses_input import Items, flat_tools, flat_use
from octavo.server.responses_output import ResponseWriter, Told
from octavo.server.routes.chat import TemplateFields
from octavo.server.sampling import drawn, either_form, form_of, renamed

router = APIRouter()

_LOGPROBS = "message.output_text.logprobs"
_KEPT = "is not supported: nothing is kept, so give the whole conversation as input"


def _only(*values: Any) -> Any:
    """A field of which no other values are taken."""
    return documented("without effect, for compatibility: other values are not supported", {"enum": [*values, None]})


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="false: there is none")


class ResponsesRequest(DrawParams, EngineFields, TemplateFields):
    """Answer a conversation, in items."""

    neutral: ClassVar[Any] = {
        "background": ((False,), "is not supported: answer and request are one"),
        "conversation": ((), _KEPT),
        "max_tool_calls": ((), "is not supported: it is for tools that the server would call"),
        "previous_response_id": ((), _KEPT),
        "prompt": ((), "is not supported: give input, and instructions"),
        "reasoning": (
            ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
            "is not supported: templates that know of it take it in chat_template_kwargs",
        ),
        "service_tier": (("auto", "default"), "is not supported: there is one, default"),
        "store": ((False,), "true is not supported: nothing is kept"),
        "truncation": (("disabled",), "must be disabled: an input that is too long is refused"),
        # Fields of chats that have no place in such an answer.
        "n": ((1,), "is not for this route, whose answer is one; /v1/chat/completions takes it"),
        "use_beam_search": ((False,), "is not for this route; /v1/chat/completions takes it"),
        "prompt_logprobs": ((), "is not for this route; /v1/chat/completions takes it"),
        "max_tokens": ((), "is called max_output_tokens here"),
        "messages": ((), "is called input here"),
        "response_format": ((), "is called text.format here"),
        "logprobs": ((), f'is told by include: ["{_LOGPROBS}"] here'),
    }

    input: Any = documented(
        "a text, or items: messages with role and content, which is a text or parts input_text and output_text; "
        "function_call; function_call_output",
        {"anyOf": [{"type": "string"}, OBJECTS]},
        ...,
    )
    instructions: Any = text("a system message before the input")
    max_output_tokens: Any = integer("most tokens to generate; up to the model's context without", minimum=1)
    tools: Any = documented(
        'functions that the model may call: {"type": "function", "name": ..., "parameters": ...}', OBJECTS
    )
    tool_choice: Any = documented(
        '"auto", "none", "required", or {"type": "function", "name": ...}: the tool to call',
        {"anyOf": [{"type": "string", "enum": ["auto", "none", "required"]}, {"type": "object"}]},
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most; several may come without")
    include: Any = documented(
        "what is told besides: log-probabilities of tokens", {"type": "array", "items": {"enum": [_LOGPROBS]}}
    )
    top_logprobs: Any = integer("with these, of so many best tokens in their place", minimum=0)
    stream: bool | None = Field(None, description="answer with server-sent events, as tokens come")
    stream_options: ResponseStreamOptions | None = Field(None, description="of a stream")
    metadata: Any = documented("comes back in the answer", {"type": "object"})
    user: Any = text("comes back in the answer")
    safety_identifier: Any = text("comes back in the answer")
    prompt_cache_key: Any = text("comes back in the answer; prefixes are found without it")
    background: Any = _only(False)
    reasoning: Any = _only({}, {"effort": "none"})
    service_tier: Any = _only("auto", "default")
    store: Any = _only(False)
    truncation: Any = _only("disabled")
    return_token_ids: bool | None = Field(None, description="tell token ids of prompt and output as well")
    text: Any = documented(  # the last one: it has the name of what makes others
        'the answer\'s format: {"format": {"type": "text"}}, "json_object", or "json_schema" with name and schema',
        {"type": "object"},
    )


@router.post(
    "/v1/responses", **describes(ResponsesRequest, ModelResponse, "Answer a conversation, in items", streams=True)
)
@answering(ResponsesRequest)
async def responses(request: Request, context: ServerContext, body: ResponsesRequest, deadline: Deadline) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    tools = flat_tools(body.tools, limits)
    use = flat_use(tools, body.tool_choice, body.parallel_tool_calls)
    told = Told(_top_logprobs(body, use), bool(body.return_token_ids))
    params, names = _params(body, context, told)
    # On another thread, here and on the other routes: of many megabytes it takes a while.
    items = await asyncio.to_thread(Items, body.instructions, body.input, limits)
    conversation = Conversation(
        messages=items.messages,
        use=use,
        name="input",
        names=tuple(items.names),
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    async with deadline.hold():
        prompt = await write(context, conversation)
    params, more = under_calls(context, params, use, names["structured_outputs"])
    work = generation_of(request, body, "resp", [prompt], params, {**more, **names})
    writer = ResponseWriter(work, _head(body, model, params), reader_for(context.tool_format, use.names), told)
    return await answer(context, work, deadline, writer, streams=bool(body.stream), failed=writer.failed)


def _params(body: ResponsesRequest, context: ServerContext, told: Told) -> tuple[SamplingParams, dict[str, str]]:
    """And what the request calls fields of the library's."""
    _check_labels(body)
    given = sampling_fields(body)
    field = "text.format"
    found = form_of(field, _format(body.text), nested="")
    given["structured_outputs"], name = either_form(field, *found, body.structured_outputs)
    given |= {"max_tokens": body.max_output_tokens, "logprobs": told.top_logprobs}
    names = {"structured_outputs": name, "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
    with renamed(names):
        return drawn(given, context, streamed=bool(body.stream)), names


def _check_labels(body: ResponsesRequest) -> None:
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        value = getattr(body, name)
        if not isinstance(value, str | None):
            raise invalid(name, f"must be a string, not {shown(value)}")
    if not isinstance(body.metadata, dict | None):
        raise invalid("metadata", f"must be an object, not {shown(body.metadata)}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "has no effect without stream")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise invalid("stream_options.include_obfuscation", "true is not supported")


def _format(given: object) -> Any:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise invalid("text", f"must be an object with a format, not {shown(given)}")
    if unknown := given.keys() - {"format", "verbosity"}:
        raise unknown_field("text", unknown, ["format"])
    if given.get("verbosity") not in (None, "medium"):
        raise invalid("text.verbosity", f"is not supported: medium alone, not {shown(given['verbosity'])}")
    return given.get("format")


def _top_logprobs(body: ResponsesRequest, use: ToolUse) -> int | None:
    """Of how many best tokens; None: no log-probabilities are told. Raises ApiError."""
    included = [] if body.include is None else body.include
    if not isinstance(included, list):
        raise invalid("include", f"must be a list, not {shown(included)}")
    for number, one in enumerate(included):
        if one != _LOGPROBS:
            raise invalid(f"include[{number}]", f"must be {_LOGPROBS}: there is nothing else, not {shown(one)}")
    if not included:
        if body.top_logprobs not in (None, 0):
            raise invalid("top_logprobs", f'has no effect without include: ["{_LOGPROBS}"]')
        return None
    if use.tools:
        raise invalid("include", f"{_LOGPROBS} is not for answers with calls of tools, which are no texts")
    return 0 if body.top_logprobs is None else body.top_logprobs


def _head(body: ResponsesRequest, model: str, params: SamplingParams) -> dict[str, Any]:
    """Fields of the answer that are the request's, or are by default."""
    return {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "tools": [{"strict": False, "parameters": None, **tool} for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": _format(body.text) or {"type": "text"}},
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "truncation": "disabled",
        "store": False,
        "background": False,
        "service_tier": "default",
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
    }
