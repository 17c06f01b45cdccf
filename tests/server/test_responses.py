"""/v1/responses with OpenAI's own client: the answers of /v1/chat/completions, in items and typed events."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from openai import APIError, BadRequestError, OpenAI, pydantic_function_tool
from openai.types.responses import Response, ResponseStreamEvent

from octavo import SamplingParams
from octavo.server.chat_output import reader_for
from octavo.server.generation import Generation, PromptTokens
from octavo.server.responses_output import ResponseWriter, Told
from tests.server.broken_streams import FAILING, SECRET, fail, late
from tests.server.calls import (
    ADD,
    CHAT,
    CHAT_TOOLS,
    DRAWN,
    FLAT_TOOLS,
    FORMS,
    MIXED,
    SCHEMA,
    City,
    events_in_parts,
    random_pieces,
    together,
)
from tests.server.conftest import MODEL, Running, error_of

PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def server(hermes_server: Running) -> Iterator[Running]:
    yield hermes_server
    hermes_server.until_idle()


def events_of(server: Running, body: dict[str, Any], path: str = PATH) -> list[dict[str, Any]]:
    """A stream's events, checked: their names, and against the client's own types."""
    response = server.post(path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    return found


def replayed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that events tell, put together from what is new in each; their order is checked."""
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert [one["type"] for one in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    items: list[dict[str, Any]] = []
    doing = "nothing"  # what must go on, or end, before something else begins
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert doing == "nothing" and event["output_index"] == len(items)
            items.append(event["item"])
            assert items[-1]["status"] == "in_progress"
            doing = items[-1]["type"]
            continue
        item = items[event["output_index"]]
        assert event["output_index"] == len(items) - 1
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "output_item.done":
            assert doing == "done" and event["item"] == {**item, "status": event["item"]["status"]}
            items[-1], doing = event["item"], "nothing"
        elif item["type"] == "function_call":
            assert doing == "function_call"
            if kind == "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            else:
                assert kind == "function_call_arguments.done" and event["arguments"] == item["arguments"]
                doing = "done"
        elif kind == "content_part.added":
            assert doing == "message" and item["content"] == []
            item["content"].append(event["part"])
            doing = "text"
        elif kind == "output_text.delta":
            assert doing == "text"
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] = item["content"][0]["logprobs"] + event["logprobs"]
        elif kind == "output_text.done":
            assert doing == "text" and event["text"] == item["content"][0]["text"]
            doing = "part"
        else:
            assert kind == "content_part.done" and doing == "part" and event["part"] == item["content"][0]
            doing = "done"
    assert doing == "nothing"
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}" and last["response"]["output"] == items
    return dict(last["response"])


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What must be the same each time; KV is cached the second time."""
    output = [{k: v for k, v in one.items() if k not in ("id", "call_id")} for one in response["output"]]
    kept = {k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at", "usage")}
    usage = {k: v for k, v in response["usage"].items() if k != "input_tokens_details"}
    return {**kept, "output": output, "usage": usage}


def as_chat(response: dict[str, Any]) -> dict[str, Any]:
    """The message and what else a chat tells of the same answer."""
    texts = [one["content"][0]["text"] for one in response["output"] if one["type"] == "message"]
    calls = [(one["name"], one["arguments"]) for one in response["output"] if one["type"] == "function_call"]
    reason = {"completed": "tool_calls" if calls else "stop", "incomplete": "length"}[response["status"]]
    usage = response["usage"]
    ids = response["prompt_token_ids"], response["token_ids"]
    counts = usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]
    return {"text": "".join(texts), "calls": calls, "reason": reason, "ids": ids, "usage": counts}


def of_chat(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls", ())]
    usage = answer["usage"]
    return {
        "text": choice["message"]["content"] or "",
        "calls": calls,
        "reason": choice["finish_reason"],
        "ids": (answer["prompt_token_ids"], choice["token_ids"]),
        "usage": (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]),
    }


HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PARTS = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
CALLED: list[Any] = [
    {"role": "user", "content": "sum?"},
    {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
    },
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "1",
        "name": "add",
        "arguments": '{"a": true}',
        "status": "completed",
    },
    {"type": "function_call", "call_id": "2", "name": "add", "arguments": ""},
    {"type": "function_call_output", "call_id": "1", "output": "3"},
    {"type": "function_call_output", "call_id": "2", "output": PARTS},
]
CALLED_CHAT: list[Any] = [
    {"role": "user", "content": "sum?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": true}'}},
            {"id": "2", "type": "function", "function": {"name": "add", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
]
FORM: dict[str, Any] = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
NAMED: dict[str, Any] = {"type": "function", "name": "add"}
STRICT: list[Any] = [{**tool, "strict": True} for tool in FLAT_TOOLS]


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"input": "hello"}, {"messages": HELLO}),
        (
            {"input": HELLO, "instructions": "be brief", "top_k": 20, "min_p": 0.01, "top_p": 0.9},
            {
                "messages": [{"role": "system", "content": "be brief"}, *HELLO],
                "top_k": 20,
                "min_p": 0.01,
                "top_p": 0.9,
            },
        ),
        (
            {"input": [{"role": "developer", "content": PARTS}, {"type": "message", "role": "user", "content": "x"}]},
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
                    {"role": "user", "content": "x"},
                ]
            },
        ),
        ({"input": CALLED, "tools": FLAT_TOOLS}, {"messages": CALLED_CHAT, "tools": CHAT_TOOLS}),
        (
            {
                "input": [*HELLO, {"role": "assistant", "content": "Well, "}],
                "continue_final_message": True,
            },
            {"messages": [*HELLO, {"role": "assistant", "content": "Well, "}], "continue_final_message": True},
        ),
        (
            {"input": "hello", "text": {"format": FORM}},
            {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ),
        (
            {"input": "hello", "text": {"format": {"type": "json_object"}}, "stop": ["x"], "logit_bias": {"40": 2}},
            {
                "messages": HELLO,
                "response_format": {"type": "json_object"},
                "stop": ["x"],
                "logit_bias": {"40": 2},
            },
        ),
        (
            {"input": "hello", "tools": FLAT_TOOLS, "tool_choice": "required", "max_output_tokens": 300},
            {"messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": "required", "max_tokens": 300},
        ),
        (
            {"input": "hello", "tools": FLAT_TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False},
            {
                "messages": HELLO,
                "tools": CHAT_TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "add"}},
                "parallel_tool_calls": False,
            },
        ),
        (
            {"input": "hello", "tools": STRICT, "text": {"format": FORM}, "parallel_tool_calls": False},
            {
                "messages": HELLO,
                "tools": [{**tool, "function": {**tool["function"], "strict": True}} for tool in CHAT_TOOLS],
                "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
                "parallel_tool_calls": False,
            },
        ),
        (
            {"input": "hello", "tools": FLAT_TOOLS, "tool_choice": "none", "repetition_penalty": 1.1},
            {"messages": HELLO, "tools": CHAT_TOOLS, "tool_choice": "none", "repetition_penalty": 1.1},
        ),
        (
            {"input": "hello", "structured_outputs": {"regex": "[ab]{3,5}"}, "cache_salt": "s", "min_tokens": 2},
            {"messages": HELLO, "structured_outputs": {"regex": "[ab]{3,5}"}, "cache_salt": "s", "min_tokens": 2},
        ),
        (
            {"input": "hello", "ignore_eos": True, "allowed_token_ids": [40, 41, 42], "presence_penalty": 1},
            {"messages": HELLO, "ignore_eos": True, "allowed_token_ids": [40, 41, 42], "presence_penalty": 1},
        ),
        (
            {"input": "hello", "chat_template_kwargs": {"x": 1}, "skip_reading_prefix_cache": True, "n": 1},
            {"messages": HELLO, "chat_template_kwargs": {"x": 1}, "skip_reading_prefix_cache": True},
        ),
    ],
)
def test_the_answers_of_chats(server: Running, body: dict[str, Any], chat: dict[str, Any]) -> None:
    """Token for token, and so are their prompts; streamed or not."""
    asked = {"max_output_tokens": 40, **DRAWN, "return_token_ids": True, **body}
    expected = server.post(CHAT, {"max_tokens": 40, **DRAWN, "return_token_ids": True, **chat}).json()
    whole = server.post(PATH, asked).json()
    assert as_chat(whole) == of_chat(expected)
    Response.model_validate(whole)
    assert without_ids(replayed(events_of(server, asked))) == without_ids(whole)


@pytest.mark.parametrize("form", FORMS)
def test_streams_of_text_and_calls(servers: dict[str, Running], form: str) -> None:
    """Put together, events are the whole answer, wherever its end cuts it."""
    server, kinds = servers[form], set()
    for seed in range(12):
        extra = {"seed": seed, "structured_outputs": {"grammar": MIXED[form]}, "return_token_ids": True}
        body = {"input": "hello", "tools": FLAT_TOOLS, "max_output_tokens": [20, 36, 52, 400][seed % 4], **extra}
        whole = server.post(PATH, body).json()
        assert without_ids(replayed(events_of(server, body))) == without_ids(whole)
        chat = {"messages": HELLO, "tools": CHAT_TOOLS, "max_tokens": body["max_output_tokens"], **extra}
        assert as_chat(whole) == of_chat(server.post(CHAT, chat).json())
        for item in whole["output"]:
            kinds.add((item["type"], item["status"]))
            if item["type"] == "function_call" and item["status"] == "completed":
                assert isinstance(json.loads(item["arguments"])["a"], bool)
    met = {("function_call", "completed"), ("function_call", "incomplete")}
    assert met | ({("message", "completed")} if form == "hermes" else set()) <= kinds, kinds


@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_any_size(form: str) -> None:
    """A slow reader gets several steps as one: whatever is merged, the events are those of the same answer."""
    rng = random.Random(5)
    for _ in range(300):
        reason = rng.choice(["stop", "length"])
        pieces = random_pieces(rng, reason)
        whole = writer_for(form).whole([together(pieces)])
        for most in (1, 4):
            told = events_in_parts(writer_for(form), pieces, rng, most)
            events = [json.loads(line[6:]) for line in told.split("\n") if line.startswith("data: ")]
            assert without_ids(replayed(events)) == without_ids(whole)


def writer_for(form: str) -> ResponseWriter:
    work = Generation("resp-1", ("1",), (PromptTokens("x", [1], "input"),), SamplingParams())
    return ResponseWriter(work, {}, reader_for(form, ["add"]), Told(token_ids=True))


# --- the client's own helpers ---


@pytest.fixture
def openai(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_create(openai: OpenAI) -> None:
    response = openai.responses.create(
        model=MODEL,
        input="hello",
        instructions="be brief",
        max_output_tokens=5,
        metadata={"a": "b"},
        user="me",
        temperature=0.5,
        top_p=0.9,
        truncation="disabled",
        store=False,
        extra_headers={"X-Request-Id": "my-id"},
    )
    assert response.id == "resp-my-id" and response.object == "response" and response.model == MODEL
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens" and response.completed_at is None
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 5)
    assert (response.metadata, response.user, response.instructions) == ({"a": "b"}, "me", "be brief")
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True)
    assert response.truncation == "disabled" and response.to_dict()["store"] is False
    assert response.output_text and response.usage is not None
    assert response.usage.output_tokens == 5 and response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == response.usage.input_tokens + 5


def test_what_was_cached_is_told(openai: OpenAI) -> None:
    given: Any = {"model": MODEL, "input": "tell me " * 30, "max_output_tokens": 1, "extra_body": {"cache_salt": "t"}}
    first, second = (openai.responses.create(**given).usage for _ in range(2))
    assert first is not None and second is not None and first.input_tokens_details.cached_tokens == 0
    assert 0 < second.input_tokens_details.cached_tokens < second.input_tokens == first.input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_parse(openai: OpenAI, stream: bool) -> None:
    given: Any = {"model": MODEL, "input": "hello", "text_format": City, "extra_body": {"seed": 5}}
    if stream:
        with openai.responses.stream(**given) as events:
            snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
            response = events.get_final_response()
        assert snapshots[-1] == response.output_text
    else:
        response = openai.responses.parse(**given)
    assert isinstance(response.output_parsed, City) and response.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_parsed_arguments(openai: OpenAI, stream: bool) -> None:
    """Tools made of classes, which are strict; their calls, and what these gave, go back as they came."""
    tool = pydantic_function_tool(City)
    assert tool["function"]["strict"] is True
    given: Any = {"model": MODEL, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    given["extra_body"] = {"seed": 2}
    if stream:
        with openai.responses.stream(input="hello", **given) as events:
            parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
            response = events.get_final_response()
        assert "".join(parts) == response.output[0].arguments  # type: ignore[union-attr]
    else:
        response = openai.responses.parse(input="hello", **given)
    (call,) = response.output
    assert call.type == "function_call" and isinstance(call.parsed_arguments, City)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    items: list[Any] = [*HELLO, *(one.to_dict() for one in response.output), output]
    items[1].pop("parsed_arguments")
    after = openai.responses.create(model=MODEL, input=items, max_output_tokens=3)
    assert after.output_text


def test_answers_go_back_as_they_came(openai: OpenAI) -> None:
    extra = {"seed": 4, "structured_outputs": {"grammar": MIXED["hermes"]}}
    first = openai.responses.create(model=MODEL, input="hello", tools=FLAT_TOOLS, extra_body=extra)
    calls = [one for one in first.output if one.type == "function_call"]
    assert calls
    results = [{"type": "function_call_output", "call_id": one.call_id, "output": "3"} for one in calls]
    items: Any = [*HELLO, *(one.to_dict() for one in first.output), *results]
    openai.responses.create(model=MODEL, input=items, tools=FLAT_TOOLS, max_output_tokens=3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [None, 2])
def test_logprobs(server: Running, top: int | None, stream: bool) -> None:
    body = {"input": "hello", "include": [LOGPROBS], "max_output_tokens": 8, **DRAWN}
    body |= {} if top is None else {"top_logprobs": top}
    chat = {"messages": HELLO, "logprobs": True, "top_logprobs": top or 0, "max_tokens": 8, **DRAWN}
    response = replayed(events_of(server, body)) if stream else server.post(PATH, body).json()
    (item,) = response["output"]
    expected = server.post(CHAT, chat).json()["choices"][0]["logprobs"]["content"]
    assert item["content"][0]["logprobs"] == expected and len(expected) == 8
    assert response["top_logprobs"] == (top or 0)


def test_the_end_of_a_text_has_its_logprobs_too(server: Running) -> None:
    """Also of tokens without text, which come last."""
    body = {"input": "hello", "include": [LOGPROBS], "structured_outputs": {"regex": "ab"}, "return_token_ids": True}
    response = replayed(events_of(server, body))
    (item,) = response["output"]
    assert len(item["content"][0]["logprobs"]) == len(response["token_ids"]) and item["content"][0]["text"] == "ab"


# --- what is refused ---

ITEM = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["hello"]}, "input[0]"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": 5}]}, "input[0].type"),
    ({"input": [*HELLO, {"content": "x"}]}, "input[1].role"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "y": 1}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": "x", "mood": "good"}]}, "input[0]"),
    ({"input": [{**ITEM, "arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{**ITEM, "arguments": "[]"}]}, "input[0].arguments"),
    ({"input": [{**ITEM, "arguments": None}]}, "input[0].arguments"),
    ({"input": [{**ITEM, "name": ""}]}, "input[0].name"),
    ({"input": [{**ITEM, "call_id": None}]}, "input[0].call_id"),
    ({"input": [ITEM] * 130}, "input[128]"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
    ({"input": HELLO * 5000}, "input"),
    ({"input": "x " * 2100}, "input"),
    ({"messages": HELLO}, "messages"),
    ({"instructions": 5}, "instructions"),
    ({"instructions": ["x"]}, "instructions"),
    ({"model": 5}, "model"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"min_tokens": 9, "max_output_tokens": 5}, "min_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 2}, "n"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": CHAT_TOOLS}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a", "parameters": []}]}, "tools[0].parameters"),
    ({"tools": [{"type": "function", "name": "a", "strict": "yes"}]}, "tools[0].strict"),
    ({"tools": [{"type": "function", "name": "a", "defer_loading": True}]}, "tools[0]"),
    ({"tools": FLAT_TOOLS * 100}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes", "tools": FLAT_TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "none"}, "tools": FLAT_TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "add"}}, "tools": FLAT_TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": FLAT_TOOLS}, "tool_choice"),
    ({"tool_choice": "required", "tools": FLAT_TOOLS, "text": {"format": FORM}}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"text": "x"}, "text"),
    ({"text": {"shape": 1}}, "text"),
    ({"text": {"format": "x"}}, "text.format"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "json_schema": {}}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": 5}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "square"}}}}, "text.format.schema"),
    ({"text": {"format": FORM}, "structured_outputs": {"regex": "a"}}, "text.format"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"include": "x"}, "include"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"include": [LOGPROBS], "tools": FLAT_TOOLS}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 300, "include": [LOGPROBS]}, "top_logprobs"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp-1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"truncation": "auto"}, "truncation"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"max_tool_calls": 2}, "max_tool_calls"),
    ({"user": 5}, "user"),
    ({"metadata": []}, "metadata"),
    ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
    ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage"),
    ({"request_id": "a/b"}, "request_id"),
    ({"moderation": {}}, "moderation"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"input": "hello", "max_output_tokens": 10, **({"stream": True} if stream else {}), **fields}
    if "stream_options" in fields and "stream" not in fields:
        body.pop("stream", None)
    error_of(server.post(PATH, body), 400, param)


def test_what_asks_for_nothing(server: Running) -> None:
    """Values by which a client says what is so anyway."""
    body = {
        "input": "hello",
        "max_output_tokens": 2,
        "store": False,
        "background": False,
        "truncation": "disabled",
        "service_tier": "auto",
        "reasoning": {"effort": None, "summary": None},
        "previous_response_id": None,
        "conversation": None,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "include": [],
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    response = replayed(events_of(server, body))
    assert (response["safety_identifier"], response["prompt_cache_key"]) == ("s", "k")
    assert response["service_tier"] == "default" and response["text"] == {"format": {"type": "text"}}


def test_errors_as_the_client_has_them(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        openai.responses.create(model=MODEL, input="hello", previous_response_id="resp-1")
    assert caught.value.param == "previous_response_id" and caught.value.code == "400"
    with pytest.raises(APIError) as caught_other:
        openai.responses.retrieve("resp-1")
    assert caught_other.value.code == "404"


# --- streams that do not come to their end ---


def test_a_stream_that_fails(server: Running, openai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last event says so; the whole answer has a status."""
    fail(server, monkeypatch, after=10)
    given: Any = {"model": MODEL, "input": "hello", "extra_body": {"seed": FAILING, "ignore_eos": True}}
    events = list(openai.responses.create(**given, stream=True))
    last = events[-1]
    assert last.type == "response.failed" and last.response.status == "failed" and len(events) > 4
    assert last.response.error is not None and last.response.error.code == "server_error"
    assert "bad row" in last.response.error.message and SECRET not in last.response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert last.response.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    error_of(server.post(PATH, {"input": "hello", "seed": FAILING, "ignore_eos": True}), 500)


def test_a_stream_that_is_late(server: Running) -> None:
    lines, _ = late(server, PATH, {"input": "hello", "ignore_eos": True})
    last = json.loads(lines[-1][6:])
    assert last["type"] == "response.failed" and "in time" in last["response"]["error"]["message"]


def test_the_tool_is_told_as_in_chats(server: Running) -> None:
    """Its description and parameters, and not that it is strict, of which templates know nothing."""
    tools = [{"type": "function", **ADD, "strict": True}]
    body = {"input": "hello", "tools": tools, "max_output_tokens": 1, "return_token_ids": True}
    found = server.llm.tokenizer.decode(server.post(PATH, body).json()["prompt_token_ids"], skip_special_tokens=False)
    assert "of two" in found and "strict" not in found


def test_very_many_texts_behind_a_call(server: Running) -> None:
    """They are one message, and are put together in time that grows with them alone: it used to grow with the square,
    for minutes, in which nobody else was answered."""
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    texts = [{"type": "output_text", "text": "a"}] * 40
    body = {"input": [*HELLO, call, *[{"role": "assistant", "content": texts}] * 4000]}
    error_of(server.post(PATH, body), 400)
