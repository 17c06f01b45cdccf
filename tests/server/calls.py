"""Tools; grammars by which a random model writes text with calls among it, in both forms; such answers in pieces."""

from __future__ import annotations

import json
import random
from typing import Any, Literal

import pydantic

from octavo.core.outputs import CompletionOutput, RequestOutput
from octavo.server.answers import Writer
from octavo.server.generation import Piece, merged

CHAT = "/v1/chat/completions"
DRAWN = {"temperature": 1.0, "seed": 3}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}

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


class City(pydantic.BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    large: bool


_PARTS = ["<tool_call>", "</tool_call>", '{"name": "add", "arguments": ', '{"name": "add", "parameters": ', "{", "}"]
_PARTS += ['{"a": 1}', "}", "; ", "so ", '"', "\n"]


def random_pieces(rng: random.Random, reason: str) -> list[Piece]:
    """An answer with calls that are whole, or broken, or none; with this reason at its end."""
    size = rng.randint(1, 30)
    pieces: list[Piece] = []
    for number in range(size):
        end = reason if number == size - 1 else None
        one = CompletionOutput(0, rng.choice(_PARTS), [number], finish_reason=end)
        pieces.append((0, RequestOutput("r", None, [1], [one], end is not None)))
    return pieces


def together(pieces: list[Piece]) -> RequestOutput:
    """What a reader gets who has read nothing before."""
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = merged(whole, piece) or whole
    return whole[1]


def events_in_parts(writer: Writer, pieces: list[Piece], rng: random.Random, most: int) -> str:
    """What the writer makes of the pieces, up to so many at a time."""
    left, told = list(pieces), b""
    while left:
        count = rng.randint(1, most)
        told += writer.chunks(left[:count])
        left = left[count:]
    return (told + writer.last()).decode()
