"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.outputs import CompletionOutput, RequestOutput
from octavo.server.answer_types import ChatCompletion
from octavo.server.answers import UsageCount, answer, answering, usage_of
from octavo.server.chat_output import MessageReader, reader_for
from octavo.server.context import ServerContext
from octavo.server.conversation import Conversation, under_calls, write
from octavo.server.errors import invalid
from octavo.server.fields import OBJECTS, Body, SamplingFields, documented, integer
from octavo.server.generation import (
    Deadline,
    Generation,
    Piece,
    PromptTokens,
    check_outputs,
    generation_of,
    names_of,
)
from octavo.server.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.messages import ToolUse, choice_of, messages_of, tool_use, tools_of
from octavo.server.openapi import describes
from octavo.server.sampling import Params, params_of, renamed, written_as
from octavo.server.streams import DONE, event

router = APIRouter()


class TemplateFields(Body):
    """How the chat template writes a conversation."""

    add_generation_prompt: bool | None = Field(None, description="end with the opening of the assistant's turn")
    continue_final_message: bool | None = Field(None, description="go on in the final message")
    chat_template_kwargs: Any = documented("variables of the chat template", {"type": "object"})


class ConversationFields(TemplateFields):
    """A conversation, and how the chat template writes it."""

    messages: Any = documented(
        "objects with role and content, which is a text or a list of text parts; of assistants also tool_calls, of "
        "tools tool_call_id",
        OBJECTS,
    )
    tools: Any = documented("functions that the chat template tells the model of", OBJECTS)
    tool_choice: Any = documented(
        '"auto", "none", "required", or {"type": "function", "function": {"name": ...}}: the tool to call',
        {"anyOf": [{"type": "string", "enum": ["auto", "none", "required"]}, {"type": "object"}]},
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most; several may come without")


class ChatCompletionRequest(SamplingFields, ConversationFields):
    """Answer a conversation."""

    messages: Any = documented(ConversationFields.model_fields["messages"].description or "", OBJECTS, ...)
    max_tokens: Any = integer("most tokens to generate; up to the model's context without", minimum=1)
    max_completion_tokens: Any = integer("the same", minimum=1)
    logprobs: bool | None = Field(None, description="tell log-probabilities of tokens")
    top_logprobs: Any = integer("and of so many best ones in their place", minimum=0)


@router.post(
    "/v1/chat/completions", **describes(ChatCompletionRequest, ChatCompletion, "Answer a conversation", streams=True)
)
@answering(ChatCompletionRequest)
async def chat_completions(
    request: Request, context: ServerContext, body: ChatCompletionRequest, deadline: Deadline
) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    params = _params(body, context)
    check_outputs(params, 1, limits.max_outputs)
    async with deadline.hold():
        prompt, use = await written(context, body)
    params, names = under_calls(context, params, use, written_as(body))
    work = generation_of(request, body, "chatcmpl", [prompt], params, {**names, **_names(body)})
    writer = _Writer(context, work, body, model, use)
    return await answer(context, work, deadline, writer, streams=bool(body.stream))


def check_either(body: ConversationFields, prompt: object) -> None:
    """Of a route that takes a prompt or a conversation. Raises ApiError."""
    if (prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if body.messages is None:
        check_no_conversation(body)


def check_no_conversation(body: ConversationFields) -> None:
    """Of one without messages. Raises ApiError."""
    for name in body.model_fields_set & set(ConversationFields.model_fields):
        raise invalid(name, "has no effect without messages")


async def written(context: ServerContext, body: ConversationFields) -> tuple[PromptTokens, ToolUse]:
    """The conversation as the chat template writes it, tokenised; and what it says of calls. Raises ApiError,
    InvalidRequestError."""
    limits = context.settings.limits
    messages = await asyncio.to_thread(messages_of, body.messages, limits)
    use = tool_use(tools_of(body.tools, limits), choice_of(body.tool_choice), body.parallel_tool_calls)
    conversation = Conversation(
        messages=messages,
        use=use,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    return await write(context, conversation), use


def _params(body: ChatCompletionRequest, context: ServerContext) -> Params:
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens is not None and body.max_tokens != most:
        raise invalid("max_completion_tokens", "and max_tokens are two names of one thing, and differ")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "has no effect without logprobs")
    top = (0 if body.top_logprobs is None else body.top_logprobs) if body.logprobs else None
    with renamed(_names(body)):
        return params_of(body, context, {"logprobs": top, "max_tokens": most})  # None: up to the end of the context


def _names(body: ChatCompletionRequest) -> dict[str, str]:
    """What this request calls fields of the library's."""
    names = names_of(body)
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    if body.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
    return names


class _Writer:
    """Outputs in the form of this route, as a whole or piece by piece."""

    def __init__(
        self,
        context: ServerContext,
        work: Generation,
        body: ChatCompletionRequest,
        model: str,
        use: ToolUse,
    ) -> None:
        self._work = work
        self._body = body
        self._names = use.names
        self._form = context.tool_format
        self._head = {
            "id": work.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": context.llm.system_fingerprint,
        }
        self._top = 0 if body.top_logprobs is None else body.top_logprobs
        self._readers: dict[int, MessageReader] = {}  # by choice
        self._usage = UsageCount(work.num_prompt_tokens)
        self._tells_usage = bool(body.stream_options and body.stream_options.include_usage)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        answer: dict[str, Any] = {
            **self._head,
            "choices": [self._choice(one) for one in output.outputs],
            "usage": usage_of(self._work.num_prompt_tokens, outputs),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._work.prompts[0].token_ids
        return answer

    def _reader(self) -> MessageReader:
        return MessageReader(reader_for(self._form, self._names))

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        reader = self._reader()
        reader.read(one.text, last=True)
        return {
            "index": one.index,
            "message": {"role": "assistant", **reader.message()},
            **self._end(one, reader),
        }

    def _end(self, one: CompletionOutput, reader: MessageReader) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "logprobs": None if one.logprobs is None else chat_logprobs(one.token_ids, one.logprobs, self._top),
            "finish_reason": reader.finish_reason(one.finish_reason),
            "stop_reason": one.stop_reason,
        }
        if self._body.return_token_ids:
            fields["token_ids"] = one.token_ids
        return fields

    def chunks(self, pieces: list[Piece]) -> bytes:
        self._usage.note(pieces)
        return b"".join(self._chunk(one) for _, output in pieces for one in output.outputs)

    def _chunk(self, one: CompletionOutput) -> bytes:
        begun = b""
        reader = self._readers.get(one.index)
        if reader is None:
            reader = self._readers[one.index] = self._reader()
            begun = self._begin(one.index)
        delta = reader.read(one.text, last=one.finished)
        choice = {"index": one.index, "delta": delta, **self._end(one, reader)}
        told = delta or one.finished or choice["logprobs"] or choice.get("token_ids")
        return begun + self._event([choice]) if told else begun

    def _begin(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        more = {}
        if self._body.return_token_ids and len(self._readers) == 1:
            more["prompt_token_ids"] = self._work.prompts[0].token_ids
        return self._event([choice], **more)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {**self._head, "usage": None} if self._tells_usage else self._head
        return event({**head, **more, "choices": choices})

    def last(self) -> bytes:
        told = event({**self._head, "choices": [], "usage": self._usage.as_dict()}) if self._tells_usage else b""
        return told + DONE
