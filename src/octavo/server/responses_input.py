"""What a request to /v1/responses holds, as a conversation: items as messages, and tools and choices in its flat forms
as those of chats."""

from __future__ import annotations

from typing import Any

from octavo.core.errors import shown
from octavo.server.errors import invalid
from octavo.server.messages import (
    ROLES,
    Choice,
    Named,
    Tool,
    ToolUse,
    Transcript,
    choice_of,
    decoded,
    filled,
    known_fields,
    listed,
    tool_of,
    tool_use,
)
from octavo.server.settings import Limits

# What answers hold besides is taken back with them: it says nothing to the model.
_ITEMS = {
    "message": frozenset(["type", "role", "content", "id", "status"]),
    "function_call": frozenset(["type", "call_id", "name", "arguments", "id", "status"]),
    "function_call_output": frozenset(["type", "call_id", "output", "id", "status"]),
}
_PARTS = {
    "input_text": frozenset(["type", "text"]),
    "output_text": frozenset(["type", "text", "annotations", "logprobs"]),
}
_TOOL_KEYS = frozenset(["type", "name", "description", "parameters", "strict"])


class Items(Transcript):
    """Of items."""

    def __init__(self, instructions: object, value: object, limits: Limits) -> None:
        """Raises ApiError."""
        super().__init__()
        self._limits = limits
        if instructions is not None:
            if not isinstance(instructions, str):
                raise invalid("instructions", f"must be a string, not {shown(instructions)}")
            self._add("instructions", "system", [instructions])
        if isinstance(value, str):
            self._add("input", "user", [value])
        elif not isinstance(value, list):
            raise invalid("input", f"must be a string or a list of items, not {shown(value)}")
        else:
            for number, item in enumerate(listed("input", value, limits.max_messages)):
                self._take(f"input[{number}]", item)
        self._put_together()

    def _take(self, field: str, item: object) -> None:
        kind = (item.get("type") or "message") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in _ITEMS:
            allowed = f"must be an item of type {', '.join(_ITEMS)}"
            raise invalid(f"{field}.type" if isinstance(item, dict) else field, f"{allowed}, not {shown(kind or item)}")
        known = known_fields(field, item, _ITEMS[kind], "an item")
        if kind == "message":
            self._message(field, known)
        elif kind == "function_call":
            self._call(field, known)
        else:
            texts = _content(f"{field}.output", known.get("output"))
            self._add(field, "tool", texts, tool_call_id=filled(field, known, "call_id"))

    def _message(self, field: str, item: dict[str, Any]) -> None:
        role = item.get("role")
        if role == "tool" or not isinstance(role, str) or role not in ROLES:
            raise invalid(f"{field}.role", f"must be user, assistant, system or developer, not {shown(role)}")
        texts = _content(f"{field}.content", item.get("content"))
        if role == "assistant" and self.messages and self.messages[-1].get("tool_calls"):
            self._texts[-1] += texts  # an answer goes on behind its calls
        else:
            self._add(field, ROLES[role], texts)

    def _call(self, field: str, item: dict[str, Any]) -> None:
        """Of the assistant's message before it, or one of calls alone."""
        arguments = decoded(f"{field}.arguments", item.get("arguments"), self._limits)
        function = {"name": filled(field, item, "name"), "arguments": arguments}
        call = {"id": filled(field, item, "call_id"), "type": "function", "function": function}
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add(field, "assistant", [])
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append(call)
        if len(calls) > self._limits.max_tool_calls:
            raise invalid(field, f"may have at most {self._limits.max_tool_calls - 1} calls before it")


def _content(field: str, value: object) -> list[str]:
    """Of a text, or of parts with text."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(field, f"must be a string or a list of text parts, not {shown(value)}")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            problem = 'only parts {"type": "input_text" or "output_text", "text": "..."} are supported'
            raise invalid(f"{field}[{number}]", problem)
        known = known_fields(f"{field}[{number}]", part, _PARTS[kind], "a part")
        if not isinstance(known.get("text"), str):
            raise invalid(f"{field}[{number}].text", f"must be a string, not {shown(known.get('text'))}")
        texts.append(known["text"])
    if not texts:
        raise invalid(field, "is empty")
    return texts


def flat_tools(value: object, limits: Limits) -> list[Tool]:
    """Raises ApiError."""
    if value in (None, []):  # the client's way to say that there are none
        return []
    return [_tool(f"tools[{number}]", one) for number, one in enumerate(listed("tools", value, limits.max_tools))]


def _tool(field: str, value: object) -> Tool:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "function":
        problem = 'must be {"type": "function", "name": ..., "parameters": ...}: other tools are not supported'
        raise invalid(field, f"{problem}, not {shown(value if kind is None else kind)}")
    return tool_of(field, known_fields(field, value, _TOOL_KEYS, "a tool"))


def flat_choice(value: object) -> Choice | None:
    """Raises ApiError."""
    if not isinstance(value, dict):
        return choice_of(value)
    if value.keys() != {"type", "name"} or value["type"] != "function" or not isinstance(value["name"], str):
        allowed = 'must be "none", "auto", "required" or {"type": "function", "name": ...}'
        raise invalid("tool_choice", f"{allowed}, not {shown(value)}")
    return Named(value["name"])


def flat_use(tools: list[Tool], choice: object, parallel: bool | None) -> ToolUse:
    """What a request says of calls; clients send what they say of them with no tools as well. Raises ApiError."""
    chosen = flat_choice(choice)
    if not tools:
        return tool_use(None, None if chosen == "auto" else chosen, None)
    return tool_use(tools, chosen, parallel)
