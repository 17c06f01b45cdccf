"""Requests of which one value, anywhere in them, is another: taken, or refused with a field that is in them."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import test_messages, test_responses
from tests.server.calls import ANTHROPIC_TOOLS, CHAT_TOOLS, FLAT_TOOLS
from tests.server.conftest import Running

ROUNDS = int(os.environ.get("HTTP_MUTATIONS", "150"))
CHAT_CHOICE = {"type": "function", "function": {"name": "add"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        "input": test_responses.CALLED,
        "instructions": "be brief",
        "tools": FLAT_TOOLS,
        "tool_choice": {"type": "function", "name": "add"},
        "parallel_tool_calls": False,
        "max_output_tokens": 2,
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
        "stream": False,
    },
    "/v1/messages": {
        "messages": test_messages.CALLED,
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "tool", "name": "add"},
        "max_tokens": 2,
        "stop_sequences": ["x"],
        "metadata": {"user_id": "me"},
        "output_config": {"format": None},
        "stream": False,
    },
    "/v1/chat/completions": {
        "messages": test_messages.CALLED_CHAT,
        "tools": CHAT_TOOLS,
        "tool_choice": CHAT_CHOICE,
        "parallel_tool_calls": False,
        "max_tokens": 2,
        "stream": False,
    },
}
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    1e300,
    "",
    "\x00\u2028",
    "x" * 3000,
    [],
    {},
    [None],
    [[]],
    {"": 1},
    {"type": "text"},
    {"type": []},
    {"type": {"a": 1}},
    [{"type": "function"}],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a body."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("path", BODIES)
def test_one_value_is_another(hermes_server: Running, path: str) -> None:
    rng = random.Random(4)
    assert hermes_server.post(path, BODIES[path]).status_code == 200
    found = [place for place in places(BODIES[path]) if place]
    refused = 0
    for _ in range(ROUNDS):
        body = copy.deepcopy(BODIES[path])
        place = rng.choice(found)
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        if rng.random() < 0.15 and isinstance(holder, dict):
            del holder[place[-1]]
        else:
            holder[place[-1]] = rng.choice(ODD)
        response = hermes_server.post(path, body)
        assert response.status_code in (200, 400, 404), (place, body, response.text)
        if response.status_code != 200:
            refused += 1
            field = response.json()["error"]["param"]
            assert field and field.split(".")[0].split("[")[0] in BODIES[path].keys() | {"model"}, (
                place,
                response.text,
            )
    assert refused > ROUNDS // 4
    hermes_server.until_idle()
