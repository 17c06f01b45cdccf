"""What /v1/messages refuses, and its errors, as Anthropic's own client and OpenAI's have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from openai import BadRequestError, NotFoundError, OpenAI

from octavo.server.settings import ServerSettings
from tests.server.broken_streams import FAILING, SECRET, fail, late
from tests.server.calls import ANTHROPIC_TOOLS, CHAT_TOOLS
from tests.server.conftest import MODEL, Running, serving
from tests.server.test_messages import COUNT, FORM, HELLO, PATH


@pytest.fixture
def server(hermes_server: Running) -> Iterator[Running]:
    yield hermes_server
    hermes_server.until_idle()


@pytest.fixture
def client(server: Running) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def error_of(response: Any, status: int, param: str | None = None) -> dict[str, Any]:
    """The error in the envelope that both kinds of clients read, checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert sorted(body) == ["error", "request_id", "type"] and body["type"] == "error"
    error: dict[str, Any] = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["code"] == status
    assert error["type"].endswith("_error") and error["message"] and "\n" not in error["message"]
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param, error
    return error


ONE = {"disable_parallel_tool_use": True}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


def said(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"name": "a", "input_schema": {"type": "object"}, **fields}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]"),
    ({"messages": HELLO * 5000}, "messages"),
    ({"messages": [{"role": "user", "content": "x " * 2100}]}, "messages"),
    (said("user", "x"), "messages[0].content[0]"),
    (said("user", {"type": "text"}), "messages[0].content[0].text"),
    (said("user", {"type": "text", "text": "x", "y": 1}), "messages[0].content[0]"),
    (said("user", {"type": "text", "text": "x", "cache_control": 1}), "messages[0].content[0].cache_control"),
    (said("user", {"type": "text", "text": "x", "citations": [1]}), "messages[0].content[0].citations"),
    (said("user", {"type": "image", "source": {}}), "messages[0].content[0].type"),
    (said("user", {"type": "document", "source": {}}), "messages[0].content[0].type"),
    (said("user", {"type": ["text"]}), "messages[0].content[0].type"),
    (said("user", USE), "messages[0].content[0].type"),
    (said("assistant", RESULT), "messages[0].content[0].type"),
    (said("assistant", {"type": "thinking", "thinking": "x"}), "messages[0].content[0].type"),
    (said("system", USE), "messages[0].content[0]"),
    (said("assistant", {**USE, "input": "{}"}), "messages[0].content[0].input"),
    (said("assistant", {**USE, "name": ""}), "messages[0].content[0].name"),
    (said("assistant", {**USE, "id": None}), "messages[0].content[0].id"),
    (said("assistant", USE), "messages[0]"),
    (said("assistant", *[USE] * 130), "messages[0].content"),
    (said("user", {**RESULT, "tool_use_id": None}), "messages[0].content[0].tool_use_id"),
    (said("user", {**RESULT, "content": 5}), "messages[0].content[0].content"),
    (said("user", {**RESULT, "content": [{"type": "image"}]}), "messages[0].content[0].content[0].type"),
    (said("user", {**RESULT, "is_error": "yes"}), "messages[0].content[0].is_error"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"model": 5}, "model"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
    ({"stop": ["x"]}, "stop"),
    ({"n": 1}, "n"),
    ({"metadata": {"mood": "good"}}, "metadata"),
    ({"metadata": [1]}, "metadata"),
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": CHAT_TOOLS}, "tools[0]"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    (tool(type="bash_20250124"), "tools[0].type"),
    (tool(name="a b"), "tools[0].name"),
    (tool(input_schema=[]), "tools[0].input_schema"),
    (tool(description=5), "tools[0].description"),
    (tool(strict=1), "tools[0].strict"),
    (tool(defer_loading=True), "tools[0].defer_loading"),
    (tool(allowed_callers=["code_execution_20250825"]), "tools[0].allowed_callers"),
    (tool(input_examples=[{}]), "tools[0].input_examples"),
    ({"tools": ANTHROPIC_TOOLS * 100}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": "auto", **tool()}, "tool_choice"),
    ({"tool_choice": {"type": "maybe"}, **tool()}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}, **tool()}, "tool_choice.name"),
    ({"tool_choice": {"type": "any", "name": "a"}, **tool()}, "tool_choice.name"),
    ({"tool_choice": {"type": "tool", "name": "b"}, **tool()}, "tool_choice"),
    (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}, **tool()},
        "tool_choice.disable_parallel_tool_use",
    ),
    ({"output_config": {"effort": "high"}}, "output_config"),
    ({"output_config": 5}, "output_config"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "square"}}}},
        "output_config.format.schema",
    ),
    ({"output_config": {"format": FORM}, "structured_outputs": {"regex": "a"}}, "output_config.format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    (
        {"structured_outputs": {"regex": "a"}, **tool(), "tool_choice": {"type": "auto", **ONE}},
        "tool_choice.disable_parallel_tool_use",
    ),
    ({"structured_outputs": {"regex": "a"}, **tool(strict=True)}, "tools[0].strict"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"thinking": {"type": "adaptive"}}, "thinking"),
    ({"cache_control": 5}, "cache_control"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"speed": "fast"}, "speed"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"context_management": {"edits": []}}, "context_management"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"store": True}, "store"),
    ({"mood": "good"}, "mood"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 10, **({"stream": True} if stream else {}), **fields}
    error = error_of(server.post(PATH, body), 400, param)
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing(server: Running) -> None:
    """Values by which a client says what is so anyway."""
    body = {
        "messages": HELLO,
        "max_tokens": 2,
        "system": "",
        "tools": [],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
        "service_tier": "standard_only",
        "speed": "standard",
        "cache_control": {"type": "ephemeral"},
        "metadata": {"user_id": None},
        "stop_sequences": [],
        "output_config": {"format": None},
        "container": None,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    assert server.post(PATH + "?beta=true", body, headers=headers).status_code == 200
    examples = tool(input_examples=[], defer_loading=False, allowed_callers=["direct"], eager_input_streaming=True)
    assert server.post(PATH, {"messages": HELLO, "max_tokens": 1, **examples}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": HELLO, "max_tokens": 5}, "max_tokens"),
        ({"messages": HELLO, "tools": 5}, "tools"),
    ],
)
def test_what_cannot_be_counted(server: Running, body: dict[str, Any], param: str) -> None:
    error_of(server.post(COUNT, body), 400, param)


# --- errors, as both kinds of clients have them ---


def test_errors_as_the_client_has_them(client: Anthropic) -> None:
    given: Any = {"model": MODEL, "max_tokens": 1, "messages": HELLO}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**given, extra_body={"temperature": -1})
    assert caught.value.type == "invalid_request_error" and "temperature" in str(caught.value)
    assert caught.value.request_id
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**given, "model": "other"})
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.NotFoundError) as nowhere:
        client.messages.batches.list()
    assert nowhere.value.type == "not_found_error"


def test_errors_as_openais_client_has_them(server: Running) -> None:
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(BadRequestError) as caught:
        client.post("/messages", body={"messages": HELLO}, cast_to=object)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "400")
    with pytest.raises(NotFoundError):
        client.post("/messages", body={"messages": HELLO, "max_tokens": 1, "model": "x"}, cast_to=object)


def test_keys_and_routes(tiny_llama_dir: Path) -> None:
    """Before a route is reached the envelope is the same: without a key, and where there is no route."""
    settings = ServerSettings(port=0, served_model_name=(MODEL,), api_key=("right",), root_path="/llm")
    with serving(tiny_llama_dir, settings) as running:
        given: Any = {"model": MODEL, "max_tokens": 1, "messages": HELLO}
        for key, error in (("wrong", anthropic.AuthenticationError), ("right", None)):
            client = Anthropic(base_url=running.url, api_key=key, max_retries=0)
            if error is None:
                assert client.messages.create(**given).content
                continue
            with pytest.raises(error) as caught:
                client.messages.create(**given)
            assert caught.value.type == "authentication_error"
        keyed = {"x-api-key": "right"}
        error_of(running.client.get(running.url + PATH, headers=keyed), 405)
        error_of(running.client.get(running.url + PATH + "/batches", headers=keyed), 404)
        assert list(running.client.get(running.url + "/v1/messagesx", headers=keyed).json()) == ["error"]


def test_a_stream_that_fails(server: Running, client: Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last event is the error, of which the client makes its own; the whole answer has a status."""
    fail(server, monkeypatch, after=10)
    given: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    given["extra_body"] = {"seed": FAILING, "ignore_eos": True}
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        for event in client.messages.create(**given, stream=True):
            seen.append(event.type)
    assert seen[0] == "message_start" and "content_block_delta" in seen and "message_stop" not in seen
    assert caught.value.type == "api_error" and "bad row" in str(caught.value) and SECRET not in str(caught.value)
    with pytest.raises(anthropic.InternalServerError):
        client.messages.create(**given)


def test_a_stream_that_is_late(server: Running) -> None:
    lines, response = late(server, PATH, {"messages": HELLO, "max_tokens": 400, "ignore_eos": True})
    assert lines[-2] == "event: error"
    error = json.loads(lines[-1][6:])
    assert error["error"]["type"] == "timeout_error" and error["request_id"] == response.headers["request-id"]
