"""Calls of tools over HTTP: demanded, chosen, streamed, and sent back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from octavo.server import chat_output

from .conftest import Running, error_of

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    },
}
STRICT: Any = {"type": "function", "function": {**ADD["function"], "strict": True}}
BAD = {"type": "json_schema", "json_schema": {"schema": {"type": "square"}}}
HELLO: Any = [{"role": "user", "content": "hello"}]


def odd(keyword: str, value: Any) -> Any:
    """A strict tool with a schema that is none."""
    schema = {"type": "object", "properties": {"a": {"type": "string", keyword: value}}}
    return {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}


@pytest.fixture
def server(hermes_server: Running) -> Iterator[Running]:
    yield hermes_server
    hermes_server.until_idle()


def ask(server: Running, **given: Any) -> Any:
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": 1, **given}
    return client.chat.completions.create(**body)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("parallel", [False, None])
def test_a_call_that_is_demanded(server: Running, choice: Any, parallel: bool | None) -> None:
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    answer = ask(server, tools=[WEATHER, ADD], tool_choice=choice, n=4, **more)
    for one in answer.choices:
        if one.finish_reason == "length":
            continue
        assert one.finish_reason == "tool_calls" and not one.message.content
        calls = one.message.tool_calls
        assert calls and (parallel is None or len(calls) == 1)
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            arguments = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert choice == "required" and arguments["city"] in ("Paris", "Rome")
            else:
                assert call.function.name == "add" and isinstance(arguments["a"], bool)
    assert any(one.finish_reason == "tool_calls" for one in answer.choices)
    server.until_idle()


def test_streamed_calls_are_the_same(server: Running) -> None:
    given: Any = {"tools": [WEATHER, ADD], "tool_choice": "required", "parallel_tool_calls": False}
    (whole,) = ask(server, **given).choices
    calls: dict[int, dict[str, str]] = {}
    content, reason = "", None
    for chunk in ask(server, stream=True, **given):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                entry = calls.setdefault(call.index, {"name": "", "arguments": "", "id": ""})
                entry["id"] += call.id or ""
                entry["name"] += call.function.name or ""
                entry["arguments"] += call.function.arguments or ""
    assert reason == whole.finish_reason == "tool_calls" and content == ""
    (expected,) = whole.message.tool_calls
    assert [(one["name"], one["arguments"]) for one in calls.values()] == [
        (expected.function.name, expected.function.arguments)
    ]
    assert calls[0]["id"].startswith("call_")


def test_a_conversation_with_calls_goes_on(server: Running) -> None:
    """What was answered can be sent back, with what the tool said."""
    (first,) = ask(server, tools=[ADD], tool_choice="required", parallel_tool_calls=False).choices
    call = first.message.tool_calls[0]
    messages = [
        *HELLO,
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    answer = ask(server, messages=messages, tools=[ADD], max_tokens=5)
    assert answer.choices[0].message.content is not None


def test_text_is_text_where_nothing_is_demanded(server: Running) -> None:
    plain = ask(server, max_tokens=20)
    with_tools = ask(server, max_tokens=20, tools=[ADD], tool_choice="none")
    assert plain.choices[0].message.content == with_tools.choices[0].message.content
    auto = ask(server, max_tokens=20, tools=[ADD])
    assert auto.choices[0].message.tool_calls is None and auto.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_a_form_or_calls(server: Running, stream: bool) -> None:
    """With response_format the model may still call; arguments of strict tools fit, of others they are an object."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [{"b": 1}, {"b": 2}]}}}
    tools = [STRICT, {"type": "function", "function": {"name": "any"}}]
    seen = set()
    for seed in range(12):
        answer = ask(server, tools=tools, response_format=form, seed=seed, max_tokens=150, stream=stream)
        name, content = "", ""
        for choice in (c for chunk in answer for c in chunk.choices) if stream else answer.choices:
            part = choice.delta if stream else choice.message
            content += part.content or ""
            for call in part.tool_calls or []:
                name = name or call.function.name
                content += call.function.arguments
            reason = choice.finish_reason
        seen.add(name)
        if reason != "length":
            value = json.loads(content)
            assert value["b"] in (1, 2) if not name else isinstance(value, dict)
            assert name != "add" or isinstance(value["a"], bool)
    assert "" in seen and seen - {""}, "there are answers and calls"
    server.until_idle()


def test_calls_of_llama(llama_server: Running) -> None:
    """A model that begins with a brace calls, and its arguments fit where the tool is strict; and but once where that
    is asked for."""
    (brace,) = llama_server.llm.tokenizer.encode("{")
    for extra, one in (({}, False), ({"parallel_tool_calls": False}, True)):
        answer = ask(llama_server, tools=[STRICT], n=4, extra_body={"logit_bias": {str(brace): 100}}, **extra)
        ended = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
        assert ended
        for choice in answer.choices:
            calls = choice.message.tool_calls
            assert calls and {call.function.name for call in calls} == {"add"} and (len(calls) == 1 or not one)
        for call in (call for choice in ended for call in choice.message.tool_calls):
            assert isinstance(json.loads(call.function.arguments)["a"], bool)
    plain = ask(llama_server, max_tokens=20, n=4, extra_body={"logit_bias": {str(brace): -100}})
    free = ask(llama_server, max_tokens=20, n=4, tools=[STRICT], extra_body={"logit_bias": {str(brace): -100}})
    assert not any(choice.message.tool_calls for choice in [*plain.choices, *free.choices])
    llama_server.until_idle()


def test_tools_of_a_model_that_knows_no_calls(shared_server: Running) -> None:
    """Nor of tools: it would never hear of them."""
    body = {"messages": HELLO, "max_tokens": 2}
    error_of(shared_server.post("/v1/chat/completions", {**body, "tools": [STRICT]}), 400, "tools")
    error_of(shared_server.post("/v1/chat/completions", {**body, "tools": [ADD]}), 400, "tools")
    unused = shared_server.post("/v1/chat/completions", {**body, "tools": [ADD], "tool_choice": "none"})
    assert unused.status_code == 200


def test_what_a_reader_makes_of_pieces() -> None:
    reader = chat_output.MessageReader(chat_output.reader_for("hermes", ["add"]))
    text = 'Hm. <tool_call>{"name": "add", "arguments": {"a": true}}</tool_call>'
    deltas = [reader.read(c, last=False) for c in text] + [reader.read("", last=True)]
    told = [one for one in deltas if one]
    assert "".join(one.get("content", "") for one in told) == "Hm."
    assert reader.message()["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": true}'}
    assert reader.finish_reason("stop") == "tool_calls" and reader.finish_reason("length") == "length"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": 5, "tools": [ADD]}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"parallel_tool_calls": False, "tools": [ADD], "structured_outputs": {"regex": "a"}}, "parallel_tool_calls"),
        ({"tools": [STRICT], "structured_outputs": {"regex": "a"}}, "tools[0].function.strict"),
        ({"tools": [{**ADD, "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [odd("pattern", "(")], "tool_choice": "required"}, "tools"),
        ({"tools": [odd("pattern", "(")], "response_format": {"type": "json_object"}}, "tools"),
        ({"tool_choice": "required", "tools": [ADD], "response_format": {"type": "json_object"}}, "tool_choice"),
        (
            {"tools": [ADD], "response_format": {"type": "json_schema", "json_schema": BAD}},
            "response_format.json_schema",
        ),
    ],
)
def test_refused(server: Running, given: dict[str, Any], param: str) -> None:
    error_of(server.post("/v1/chat/completions", {"messages": HELLO, **given}), 400, param)
    server.until_idle()


def test_calls_of_searches_and_sessions(server: Running) -> None:
    """A search is held to the calls that are demanded; a session, which promises nothing of what its branches will
    generate, takes no such demand."""
    body = {"messages": HELLO, "tools": [WEATHER, ADD], "tool_choice": "required"}
    found = server.post("/v1/octavo/beam_search", {**body, "beam_width": 2, "max_tokens": 60}).json()["outputs"]
    assert all(one["text"].startswith("<tool_call>") for one in found)
    error_of(server.post("/v1/octavo/sessions", body), 400, "tool_choice")
    error_of(server.post("/v1/octavo/sessions", {**body, "tool_choice": "auto", "parallel_tool_calls": False}), 400)
    opened = server.post("/v1/octavo/sessions", {**body, "tool_choice": "auto"})
    assert server.client.delete(f"{server.url}/v1/octavo/sessions/{opened.json()['id']}").status_code == 200
