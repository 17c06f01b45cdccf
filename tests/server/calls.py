"""Tools, and grammars by which a random model writes text with calls among it, in both forms."""

from __future__ import annotations

import json
from typing import Any

# Text here, a call there (of Llama calls alone, since it is one or the other), and all of it other with each seed.
_ADD = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["é\n", '"}']}},
    "required": ["a"],
    "additionalProperties": False,
}
_ARGS = f"args: %json {json.dumps(_ADD)}"
_HERMES_CALL = 'call: "<tool_call>\\n{\\"name\\": \\"add\\", \\"arguments\\": " args "}\\n</tool_call>"'
_LLAMA_CALL = 'call: "{\\"name\\": \\"add\\", \\"parameters\\": " args "}"'
MIXED = {
    "hermes": f"start: WORD call WORD (call WORD)?\nWORD: /[ a-zé<]{{0,8}}/\n{_HERMES_CALL}\n{_ARGS}",
    "llama3_json": f'start: call ("; " call)*\n{_LLAMA_CALL}\n{_ARGS}',
}
FORMS = list(MIXED)
ADD: dict[str, Any] = {"name": "add", "description": "of two", "parameters": _ADD}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"name": "get_weather", "parameters": CITY}
CHAT_TOOLS: list[Any] = [{"type": "function", "function": one} for one in (ADD, WEATHER)]
FLAT_TOOLS: list[Any] = [{"type": "function", **one} for one in (ADD, WEATHER)]
ANTHROPIC_TOOLS: list[Any] = [
    {"name": "add", "description": "of two", "input_schema": _ADD},
    {"name": "get_weather", "input_schema": CITY},
]
