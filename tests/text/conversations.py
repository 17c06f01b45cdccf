"""Conversations of every shape, and what transformers makes of them with a chat template."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from octavo.core.errors import InvalidRequestError
from octavo.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

_USER = {"role": "user", "content": 'Wie spät ist es in "Köln"? 😀 <b>&\'\n'}
_ANSWER = {"role": "assistant", "content": " <think>\nHm.\n</think>\n\nHalf past two."}
_MORE = {"role": "user", "content": "And in Tōkyō?"}
_SYSTEM = {"role": "system", "content": "You are terse.\n"}
_CALL = {"id": "call_0001", "type": "function", "function": {"name": "time_in", "arguments": {"city": "Köln", "h": 24}}}
_SECOND = {"id": "call_0002", "type": "function", "function": {"name": "now", "arguments": {}}}
_RESULT = {"role": "tool", "name": "time_in", "tool_call_id": "call_0001", "content": '{"time": "14:30"}'}
_SECOND_RESULT = {"role": "tool", "name": "now", "tool_call_id": "call_0002", "content": "15"}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_CALLING_TWICE = {"role": "assistant", "content": "I look.", "tool_calls": [_CALL, _SECOND]}
_THINKING = {
    "role": "assistant",
    "content": "14:30.",
    "reasoning_content": "The tool says so.",
    "thinking": "So it is.",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "time_in",
            "description": 'Time in a city, such as "Köln".',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city"},
                    "h": {"type": "integer", "enum": [12, 24], "default": 24},
                    "zones": {"type": "array", "items": {"type": ["string", "null"]}},
                    "more": {"type": "object", "properties": {"x": {"type": "number", "nullable": True}}},
                    "any": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
                },
                "required": ["city"],
            },
            "return": {"type": "string", "description": "The time"},
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]
DOCUMENTS = [{"title": "Köln", "text": "A city."}, {"title": "Zeit", "text": "Passes."}]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [_USER],
    "system": [_SYSTEM, _USER],
    "turns": [_USER, _ANSWER, _MORE],
    "system, turns": [_SYSTEM, _USER, _ANSWER, _MORE, _ANSWER, _USER],
    "answered": [_USER, _ANSWER],
    "call": [_USER, _CALLING, _RESULT],
    "calls": [_SYSTEM, _USER, _CALLING_TWICE, _RESULT, _SECOND_RESULT, _THINKING, _MORE],
    "thinking": [_SYSTEM, _USER, _THINKING, _MORE],
    "two of the user": [_USER, _MORE],
    "system late": [_USER, _SYSTEM],
    "only the system": [_SYSTEM],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": " "}],
    "developer": [{"role": "developer", "content": "Obey."}, _USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": " Two."}]}],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"tools": TOOLS, "add_generation_prompt": True},
    {"tools": TOOLS[:1], "documents": DOCUMENTS},
    {"add_generation_prompt": True, "enable_thinking": False, "reasoning_effort": "high", "custom": {"a": [1, None]}},
    {"continue_final_message": True},
]


def _wants_parts(template: ChatTemplate, message: dict[str, Any]) -> bool:
    """Whether it writes nothing but parts: transformers would lose the text there."""
    return isinstance(message["content"], str) and template._form(message["role"], template._begin()) == (False, True)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def differences(source: str, continues: bool = True) -> tuple[list[str], int]:
    """Conversations that are written otherwise than by transformers, or refused by one alone; and how many both
    wrote. `continues`: final messages are continued as well."""
    found, written = [], 0
    try:
        template = ChatTemplate(source, **SPECIAL)
    except ValueError as error:
        return [f"not compiled: {error}"], 0
    for name, messages in CONVERSATIONS.items():
        for more in OPTIONS if continues else OPTIONS[:-1]:
            if name == "parts" and not template._form("user", template._begin())[1]:
                continue  # transformers hands the list to a template that wants a string
            options = {"add_generation_prompt": False} | more
            given = [_in_parts(message) if _wants_parts(template, message) else message for message in messages]
            try:
                (theirs,), _ = render_jinja_template(conversations=[given], chat_template=source, **SPECIAL, **options)
            except Exception as error:
                theirs = None
                problem = f"{type(error).__name__}: {error}"[:100]
            try:
                ours = template.render(messages, **options)
            except InvalidRequestError as error:
                ours = None
                problem = str(error)[:100]
            if ours == theirs:
                written += ours is not None
            else:
                found.append(f"{name} {sorted(options)}: {problem if None in (ours, theirs) else 'other text'}")
    return found, written
