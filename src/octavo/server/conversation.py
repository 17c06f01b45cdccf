"""A conversation on its way to the model, whatever form a route has for it: written by the chat template, and answered
under a grammar where calls of tools are demanded, or promised to fit their schemas."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from octavo.core.errors import InvalidRequestError
from octavo.core.structured import StructuredOutputsParams, structured_outputs
from octavo.server.context import ServerContext
from octavo.server.errors import invalid
from octavo.server.generation import PromptTokens
from octavo.server.messages import ToolUse
from octavo.server.sampling import Params
from octavo.text.tool_calls import ANY_TEXT, call_grammar

Given = TypeVar("Given", bound=Params)
_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a route makes of its request."""

    messages: list[dict[str, Any]]  # as templates expect them
    use: ToolUse
    name: str = "messages"  # what the request calls them, for errors
    names: tuple[str, ...] | None = None  # and each of them; None: by its number in `name`
    chat_template_kwargs: Any = None
    add_generation_prompt: bool | None = None  # None: unless the final message is gone on in
    continue_final_message: bool = False


async def write(context: ServerContext, conversation: Conversation) -> PromptTokens:
    """The conversation as the chat template writes it, tokenised. Raises InvalidRequestError."""
    going_on, opening = conversation.continue_final_message, conversation.add_generation_prompt
    told = conversation.use.told
    if told and not context.tells_of_tools:
        raise invalid("tools", "this model's chat template tells it of none")
    more: dict[str, Any] = {} if told is None else {"tools": told}
    render = partial(
        context.llm.chat_prompt,
        conversation.messages,
        chat_template_kwargs=conversation.chat_template_kwargs,
        add_generation_prompt=not going_on if opening is None else opening,
        continue_final_message=going_on,
        **more,
    )
    with _named(conversation):
        prompt = await asyncio.get_running_loop().run_in_executor(context.templates, render)
    return PromptTokens(prompt["prompt"], prompt["prompt_token_ids"], conversation.name)


@contextmanager
def _named(conversation: Conversation) -> Iterator[None]:
    """What templates call a message becomes what the request calls it."""
    try:
        yield
    except InvalidRequestError as error:
        found = _MESSAGE.match(error.field)
        if found is not None and conversation.names is not None:
            name, rest = conversation.names[int(found[1])], error.field[found.end() :]
        elif error.field.startswith("messages"):
            name, rest = conversation.name, error.field.removeprefix("messages")
        else:
            raise
        raise InvalidRequestError(name + rest, error.problem) from None


def under_calls(context: ServerContext, params: Given, use: ToolUse, output_form: str) -> tuple[Given, dict[str, str]]:
    """The same parameters, under a grammar of calls where there must be one: they are demanded, their arguments must
    fit a schema, or only one may come; or the answer has a form, beside which calls are not to be impossible. And what
    the request calls their structured outputs.

    `output_form`: what it calls the field that those of `params` are from. Those of ``structured_outputs`` are of all
    that is written, calls too. Raises ApiError.
    """
    given = structured_outputs(params.structured_outputs)
    names = {"structured_outputs": output_form}
    strict = [tool for tool in use.tools if tool.strict]
    if use.demanded and given is not None:
        raise invalid("tool_choice", f"and {output_form} cannot both be demanded")
    if given is not None and output_form == "structured_outputs":
        if strict or not use.several:
            field = f"{strict[0].field}.strict" if strict else use.several_name
            raise invalid(field, "cannot be promised beside structured_outputs")
        return params, names
    if not use.tools or not (use.demanded or strict or not use.several or given is not None):
        return params, names
    form = context.tool_format
    if form is None:
        if use.demanded or strict:
            field = "tool_choice" if use.demanded else f"{strict[0].field}.strict"
            raise invalid(field, "this model's chat template teaches no form of calls that is known")
        return params, names  # no calls are read, not even one
    functions = [
        {"name": tool.name, "parameters": tool.function.get("parameters") if use.demanded or tool.strict else None}
        for tool in use.demanded or use.tools
    ]
    beside = None if use.demanded else ANY_TEXT if given is None else _schema(given)
    grammar = call_grammar(form, functions, several=use.several, beside=beside)
    at_fault = "tools" if use.demanded or strict else output_form
    changed = cast(Given, params.but(structured_outputs={"grammar": grammar}))
    return changed, {"structured_outputs.grammar": at_fault}


def _schema(given: StructuredOutputsParams) -> str:
    """Of an answer that is JSON."""
    return str(given.json) if given.kind == "json" else '{"type": "object"}'
