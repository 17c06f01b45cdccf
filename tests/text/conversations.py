"""Conversations of every shape, and what transformers makes of them with a chat template."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from unittest.mock import patch

from transformers.utils import chat_template_utils

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
    {"tools": TOOLS[1:], "functions": "[]", "datetime": "Feb 29 2024, 13:00:00 GMT"},
    {"continue_final_message": True},
]
NOW = datetime(2024, 2, 29, 13)


def _as_given(template: ChatTemplate, message: dict[str, Any]) -> dict[str, Any]:
    """As transformers has to be given it: it hands on what it gets, so that a template that knows nothing but parts
    loses a string, and one that wants a string gets a list."""
    writes_strings, writes_parts = template._form(message["role"], template._begin())
    content = message["content"]
    if isinstance(content, str):
        in_parts = writes_parts and not writes_strings
        return message | {"content": [{"type": "text", "text": content}]} if in_parts else message
    return message if writes_parts else message | {"content": "\n".join(part["text"] for part in content)}


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override] # of mypy's opinion it makes a _Clock
        return NOW


def written_by_transformers(template: ChatTemplate, source: str, name: str, options: dict[str, Any]) -> str:
    """The conversation `name`. Raises whatever transformers raises."""
    given = [_as_given(template, message) for message in CONVERSATIONS[name]]
    options = {"add_generation_prompt": False} | SPECIAL | options
    with patch.object(chat_template_utils, "datetime", _Clock):
        (text,), _ = chat_template_utils.render_jinja_template([given], chat_template=source, **options)
    return text


def written_by_octavo(template: ChatTemplate, name: str, options: dict[str, Any]) -> str:
    """The conversation `name`. Raises InvalidRequestError."""
    return template.render(CONVERSATIONS[name], **{"add_generation_prompt": False} | options)


def compiled(source: str) -> ChatTemplate:
    """Raises ModelFormatError."""
    return ChatTemplate(source, now=lambda: NOW, **SPECIAL)


def differences(source: str, continues: bool = True) -> tuple[list[str], int]:
    """Conversations that are written otherwise than by transformers, or refused by one alone; and how many both
    wrote. `continues`: final messages are continued as well."""
    found, written = [], 0
    try:
        template = compiled(source)
    except ValueError as error:
        return [f"not compiled: {error}"], 0
    for name in CONVERSATIONS:
        for options in OPTIONS if continues else OPTIONS[:-1]:
            ours = theirs = None
            try:
                theirs = written_by_transformers(template, source, name, options)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:100]
            try:
                ours = written_by_octavo(template, name, options)
            except InvalidRequestError as error:
                problem = str(error)[:100]
            if ours == theirs:
                written += ours is not None
            else:
                found.append(f"{name} {sorted(options)}: {problem if None in (ours, theirs) else 'other text'}")
    return found, written
