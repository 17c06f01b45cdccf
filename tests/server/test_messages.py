"""/v1/messages with Anthropic's own client: the answers of /v1/chat/completions, in blocks and typed events."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent

from octavo import SamplingParams
from octavo.server.anthropic_output import MessageWriter, input_of
from octavo.server.chat_output import reader_for
from octavo.server.generation import Generation, PromptTokens
from tests.server.calls import (
    ANTHROPIC_TOOLS,
    CHAT,
    CHAT_TOOLS,
    DRAWN,
    FORMS,
    MIXED,
    SCHEMA,
    City,
    events_in_parts,
    random_pieces,
    together,
)
from tests.server.conftest import MODEL, Running

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
EVENT = pydantic.TypeAdapter(RawMessageStreamEvent)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@pytest.fixture
def server(hermes_server: Running) -> Iterator[Running]:
    yield hermes_server
    hermes_server.until_idle()


@pytest.fixture
def client(server: Running) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def parsed_events(text: str) -> list[dict[str, Any]]:
    """Checked: their names, and against the client's own types."""
    found = []
    for block in text.split("\n\n")[:-1]:
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event)
            found.append(event)
    return found


def events_of(server: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.post(PATH, {**body, "stream": True})
    assert response.status_code == 200, response.text
    return parsed_events(response.text)


def replayed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events tell, put together from what is new in each; their order is checked."""
    assert events[0]["type"] == "message_start"
    message: dict[str, Any] = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    open_block, text = None, ""
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(message["content"])
            open_block, text = event["content_block"], ""
            assert open_block.get("text", "") == "" and open_block.get("input", {}) == {}
            message["content"].append(open_block)
            continue
        assert open_block is not None and event["index"] == len(message["content"]) - 1
        if event["type"] == "content_block_delta":
            kind = "text_delta" if open_block["type"] == "text" else "input_json_delta"
            assert event["delta"]["type"] == kind
            text += event["delta"]["text" if kind == "text_delta" else "partial_json"]
        else:
            assert event["type"] == "content_block_stop"
            if open_block["type"] == "text":
                open_block["text"] = text
            else:
                open_block["input"] = {"arguments": text}
            open_block = None
    assert open_block is None
    delta, stop = events[-2:]
    assert (delta["type"], stop) == ("message_delta", {"type": "message_stop"})
    return {**message, **delta["delta"], "usage": delta["usage"]}


def read(message: dict[str, Any]) -> dict[str, Any]:
    """The same with inputs read as the whole answer has them, of calls whose arguments may be cut at the end."""
    for block in message["content"]:
        if block["type"] == "tool_use":
            cut = block is message["content"][-1] and message["stop_reason"] != "tool_use"
            block["input"] = input_of(block["input"]["arguments"], cut)
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """What must be the same each time; KV is cached the second time."""
    content = [{k: v for k, v in one.items() if k != "id"} for one in message["content"]]
    usage = message["usage"]
    counts = usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]
    return {**{k: v for k, v in message.items() if k != "id"}, "content": content, "usage": counts}


def as_chat(message: dict[str, Any]) -> dict[str, Any]:
    """What a chat tells of the same answer."""
    usage = message["usage"]
    return {
        "text": "".join(one["text"] for one in message["content"] if one["type"] == "text"),
        "calls": [(one["name"], one["input"]) for one in message["content"] if one["type"] == "tool_use"],
        "reason": message["stop_reason"],
        "usage": (usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]),
    }


def of_chat(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    reason = STOP_REASONS[choice["finish_reason"]]
    if reason == "end_turn" and isinstance(choice["stop_reason"], str):
        reason = "stop_sequence"
    cut = [False] * (len(calls) - 1) + [reason == "max_tokens"]
    return {
        "text": choice["message"]["content"] or "",
        "calls": [(one["name"], input_of(one["arguments"], last)) for one, last in zip(calls, cut, strict=False)],
        "reason": reason,
        "usage": (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]),
    }


CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
CALLED: list[Any] = [
    {"role": "user", "content": "sum?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "1", "name": "add", "input": {"a": True}, "caller": {"type": "direct"}},
            {"type": "tool_use", "id": "2", "name": "add", "input": {}, **CACHED},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "3"},
            {"type": "tool_result", "tool_use_id": "2", "content": PARTS, "is_error": True, **CACHED},
            {"type": "text", "text": "Well?"},
        ],
    },
    {"role": "user", "content": "And?"},
]
CALLED_CHAT: list[Any] = [
    {"role": "user", "content": "sum?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": True}}},
            {"id": "2", "type": "function", "function": {"name": "add", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "Error: hel"}, PARTS[1]]},
    {"role": "user", "content": [{"type": "text", "text": "Well?"}, {"type": "text", "text": "And?"}]},
]
FORM = {"type": "json_schema", "schema": SCHEMA}
CHAT_FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"messages": HELLO}, {"messages": HELLO}),
        (
            {"messages": [{"role": "user", "content": PARTS}], "system": "be brief", "top_k": 20, "top_p": 0.9},
            {
                "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": PARTS}],
                "top_k": 20,
                "top_p": 0.9,
            },
        ),
        (
            {"messages": HELLO, "system": [{**PARTS[0], **CACHED}, PARTS[1]], "min_p": 0.01},
            {"messages": [{"role": "system", "content": PARTS}, *HELLO], "min_p": 0.01},
        ),
        ({"messages": CALLED, "tools": ANTHROPIC_TOOLS}, {"messages": CALLED_CHAT, "tools": CHAT_TOOLS}),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "Well, "}]},
            {"messages": [*HELLO, {"role": "assistant", "content": "Well, "}], "continue_final_message": True},
        ),
        (
            {"messages": [*HELLO, {"role": "system", "content": "x"}, *HELLO]},
            {"messages": [*HELLO, {"role": "system", "content": "x"}, *HELLO]},
        ),
        (
            {"messages": HELLO, "stop_sequences": ["a", "e"], "ignore_eos": True, "max_tokens": 200},
            {"messages": HELLO, "stop": ["a", "e"], "ignore_eos": True, "max_tokens": 200},
        ),
        (
            {"messages": HELLO, "output_config": {"format": FORM}},
            {"messages": HELLO, "response_format": CHAT_FORM},
        ),
        (
            {"messages": HELLO, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 300},
            {"messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": "required", "max_tokens": 300},
        ),
        (
            {
                "messages": HELLO,
                "tools": ANTHROPIC_TOOLS,
                "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
                "max_tokens": 300,
            },
            {
                "messages": HELLO,
                "tools": CHAT_TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "add"}},
                "parallel_tool_calls": False,
                "max_tokens": 300,
            },
        ),
        (
            {
                "messages": HELLO,
                "tools": [{**one, "strict": True, "type": "custom", **CACHED} for one in ANTHROPIC_TOOLS],
                "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
                "output_config": {"format": FORM},
            },
            {
                "messages": HELLO,
                "tools": [{**one, "function": {**one["function"], "strict": True}} for one in CHAT_TOOLS],
                "parallel_tool_calls": False,
                "response_format": CHAT_FORM,
            },
        ),
        (
            {"messages": HELLO, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "none"}},
            {"messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": "none"},
        ),
        (
            {"messages": HELLO, "structured_outputs": {"regex": "[ab]{3,5}"}, "logit_bias": {"40": 2}},
            {"messages": HELLO, "structured_outputs": {"regex": "[ab]{3,5}"}, "logit_bias": {"40": 2}},
        ),
    ],
)
def test_the_answers_of_chats(server: Running, body: dict[str, Any], chat: dict[str, Any]) -> None:
    """The same prompt has the same answer, streamed or not; and its tokens can be counted before."""
    asked = {"max_tokens": 40, **DRAWN, **body}
    expected = server.post(CHAT, {"max_tokens": 40, **DRAWN, **chat}).json()
    whole = server.post(PATH, asked).json()
    assert as_chat(whole) == of_chat(expected)
    Message.model_validate(whole)
    assert without_ids(read(replayed(events_of(server, asked)))) == without_ids(whole)
    names = ("messages", "system", "tools", "tool_choice", "output_config")
    counted = server.post(COUNT, {name: body[name] for name in names if name in body})
    assert counted.json() == {"input_tokens": expected["usage"]["prompt_tokens"]}


@pytest.mark.parametrize("form", FORMS)
def test_streams_of_text_and_calls(servers: dict[str, Running], form: str) -> None:
    """Put together, events are the whole answer, wherever its end cuts it."""
    server, kinds = servers[form], set()
    for seed in range(12):
        extra = {"seed": seed, "structured_outputs": {"grammar": MIXED[form]}, "tools": ANTHROPIC_TOOLS}
        body = {"messages": HELLO, "max_tokens": [20, 36, 52, 400][seed % 4], **extra}
        whole = server.post(PATH, body).json()
        assert without_ids(read(replayed(events_of(server, body)))) == without_ids(whole)
        assert as_chat(whole) == of_chat(server.post(CHAT, {**body, "tools": CHAT_TOOLS}).json())
        kinds.add((*sorted({one["type"] for one in whole["content"]}), whole["stop_reason"]))
    both = {("text", "tool_use", "tool_use"), ("text", "tool_use", "max_tokens")}
    alone = {("tool_use", "tool_use"), ("tool_use", "max_tokens")}
    assert (both if form == "hermes" else alone) <= kinds, kinds


@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_any_size(form: str) -> None:
    """A slow reader gets several steps as one: whatever is merged, the events are those of the same answer."""
    rng = random.Random(5)
    for _ in range(300):
        pieces = random_pieces(rng, "stop")
        whole = writer_for(form)
        expected = [
            (one["type"], one.get("text"), one.get("name")) for one in whole.whole([together(pieces)])["content"]
        ]
        message = replayed(parsed_events(events_in_parts(writer_for(form), pieces, rng, 4)))
        assert [(one["type"], one.get("text"), one.get("name")) for one in message["content"]] == expected
        arguments = [one["input"]["arguments"] for one in message["content"] if one["type"] == "tool_use"]
        assert arguments == [block.text for block in whole._blocks.all if block.name is not None]


def writer_for(form: str) -> MessageWriter:
    work = Generation("msg-1", ("1",), (PromptTokens("x", [1], "messages"),), SamplingParams(max_tokens=100))
    return MessageWriter(work, "tiny", reader_for(form, ["add"]), {"path": PATH})


@pytest.mark.parametrize(
    ("arguments", "cut", "expected"),
    [
        ('{"a": 1}', False, {"a": 1}),
        ("", True, {}),
        ('{"a": 1, "b": tr', True, {"a": 1}),
        ('{"a": [1, {"b": "x', True, {"a": [1, {}]}),
        ("{a: 1}", False, {"INVALID_JSON": "{a: 1}"}),
        ("{a: 1", True, {"INVALID_JSON": "{a: 1"}),
        ('{"a": 1e999}', False, {"INVALID_JSON": '{"a": 1e999}'}),
        ('{"a": NaN}', False, {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": ' + "[" * 5000, True, {"INVALID_JSON": '{"a": ' + "[" * 5000}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_model_writes_as_arguments(arguments: str, cut: bool, expected: dict[str, Any]) -> None:
    assert input_of(arguments, cut) == expected


# --- the client's own helpers ---


def test_create(client: Anthropic) -> None:
    message = client.messages.create(
        model=MODEL,
        max_tokens=5,
        messages=HELLO,
        system="be brief",
        metadata={"user_id": "me"},
        thinking={"type": "disabled"},
        service_tier="auto",
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 10},  # which the client's newest versions do not name
        extra_headers={"X-Request-Id": "my-id", "anthropic-beta": "context-1m-2025-08-07"},
    )
    assert message.id == "msg-my-id" and message._request_id == "my-id"
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.stop_reason == "max_tokens" and message.stop_sequence is None
    (block,) = message.content
    assert block.type == "text" and block.text and message.usage.output_tokens == 5


def test_usage_adds_up(client: Anthropic, server: Running) -> None:
    """A prompt is what was computed and what was cached, together; streams tell it too."""
    given: Any = {"model": MODEL, "messages": [{"role": "user", "content": "tell me " * 30}]}
    counted = client.messages.count_tokens(**given).input_tokens
    extra = {"cache_salt": "messages"}
    first = client.messages.create(**given, max_tokens=2, extra_body=extra).usage
    second = client.messages.create(**given, max_tokens=2, extra_body=extra).usage
    with client.messages.stream(**given, max_tokens=2, extra_body=extra) as events:
        third = events.get_final_message().usage
    assert (first.input_tokens, first.cache_read_input_tokens) == (counted, 0)
    for usage in (second, third):
        assert usage.cache_read_input_tokens and usage.cache_creation_input_tokens == 0 and usage.output_tokens == 2
        assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_the_stop_sequence_is_told(client: Anthropic) -> None:
    given: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "stop_sequences": ["zz", "e"]}
    message = client.messages.create(**given, extra_body={"ignore_eos": True, "seed": 1})
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "e")
    assert message.content[0].type == "text" and "e" not in message.content[0].text


def test_the_end_of_the_context(client: Anthropic, server: Running) -> None:
    long: list[Any] = [{"role": "user", "content": "x" * 1900}]
    given: Any = {"model": MODEL, "messages": long, "max_tokens": 5000, "extra_body": {"ignore_eos": True}}
    message = client.messages.create(**given)
    assert message.stop_reason == "model_context_window_exceeded"
    counted = client.messages.count_tokens(model=MODEL, messages=long).input_tokens
    assert counted + message.usage.output_tokens == server.llm.max_model_len


@pytest.mark.parametrize("stream", [False, True])
def test_parse(client: Anthropic, stream: bool) -> None:
    given: Any = {"model": MODEL, "max_tokens": 200, "messages": HELLO, "output_format": City}
    given["extra_body"] = {"seed": 5}
    if stream:
        with client.messages.stream(**given) as events:
            text = "".join(events.text_stream)
            message = events.get_final_message()
        assert text == message.content[0].text  # type: ignore[union-attr]
    else:
        message = client.messages.parse(**given)
    assert isinstance(message.parsed_output, City) and message.stop_reason == "end_turn"


def test_a_tool_is_used(client: Anthropic) -> None:
    """With the helper for streams; the call, and what it gave, go back as they came."""
    given: Any = {"model": MODEL, "max_tokens": 300, "tools": ANTHROPIC_TOOLS, "extra_body": {"seed": 2}}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(messages=HELLO, tool_choice=choice, **given) as events:
        kinds = [event.type for event in events]
        message = events.get_final_message()
    assert "input_json" in kinds and kinds[-1] == "message_stop"
    (call,) = message.content
    assert call.type == "tool_use" and message.stop_reason == "tool_use" and call.id.startswith("toolu_")
    assert isinstance(call.input, dict) and call.name in ("add", "get_weather")
    whole = client.messages.create(messages=HELLO, tool_choice=choice, **given)
    assert [(one.name, one.input) for one in whole.content] == [(call.name, call.input)]  # type: ignore[union-attr]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "3"}]}
    after: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(model=MODEL, max_tokens=3, messages=after, tools=ANTHROPIC_TOOLS).content


async def test_the_asynchronous_client(server: Running) -> None:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        given: Any = {"model": MODEL, "max_tokens": 10, "messages": HELLO, "extra_body": DRAWN}
        whole = await client.messages.create(**given)
        async with client.messages.stream(**given) as events:
            streamed = await events.get_final_text()
    assert whole.content[0].text == streamed  # type: ignore[union-attr]
