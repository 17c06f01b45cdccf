"""/v1/chat/completions with OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from octavo import LLM, SamplingParams
from tests.server.conftest import MODEL, Running, error_of
from tests.server.test_completions import close

HELLO: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
DRAWN = {"temperature": 1.0, "seed": 3}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "extra", "more"),
    [
        ({"max_tokens": 10}, {}, {}),
        ({"max_completion_tokens": 10, "n": 2}, {}, {"max_tokens": 10}),
        ({"max_tokens": 6, "stop": ["a"], "temperature": 0.0}, {"ignore_eos": True}, {}),
        ({"max_tokens": 10}, {"structured_outputs": {"regex": "[ab]{3,5}"}}, {}),
        (
            {
                "max_tokens": 60,
                "response_format": FORM,
            },
            {},
            {"structured_outputs": {"json": SCHEMA}},
        ),
        (
            {"max_tokens": 30, "response_format": {"type": "json_object"}},
            {},
            {"structured_outputs": {"json_object": True}},
        ),
        ({"max_tokens": 5, "response_format": {"type": "text"}}, {}, {}),
    ],
)
def test_answers_are_the_librarys_streamed_or_not(
    client: OpenAI, llm: LLM, fields: dict[str, Any], extra: dict[str, Any], more: dict[str, Any]
) -> None:
    given = {**DRAWN, **fields}
    ours = {k: v for k, v in given.items() if k not in ("response_format", "max_completion_tokens")}
    (expected,) = llm.chat(HELLO, SamplingParams(**{**ours, **extra, **more}))
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, **given, extra_body=extra)
    assert [one.message.content for one in whole.choices] == [one.text for one in expected.outputs]
    assert [one.finish_reason for one in whole.choices] == [one.finish_reason for one in expected.outputs]
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, **given, extra_body=extra, stream=True):
        (choice,) = chunk.choices
        if choice.index not in texts:
            assert choice.delta.role == "assistant" and choice.delta.content == "", "each output begins with its role"
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert [texts[index] for index in sorted(texts)] == [one.text for one in expected.outputs]


def test_without_a_limit_it_goes_on_to_the_end_of_the_context(client: OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.total_tokens == llm.max_model_len
    assert answer.choices[0].finish_reason == "length"


def test_the_client_parses_json(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=form, max_tokens=200, seed=1)
    assert answer.choices[0].message.content is not None and answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: OpenAI, llm: LLM, stream: bool) -> None:
    (expected,) = llm.chat(HELLO, SamplingParams(**DRAWN, max_tokens=8, logprobs=2))
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "max_tokens": 8, **DRAWN}
    answer: Any = client.chat.completions.create(model=MODEL, messages=HELLO, **fields, stream=stream)
    choices = [one for chunk in (answer if stream else [answer]) for one in chunk.choices]
    content = [entry for one in choices if one.logprobs is not None for entry in one.logprobs.content]
    (output,) = expected.outputs
    assert output.logprobs is not None and len(content) == len(output.token_ids)
    for entry, token_id, row in zip(content, output.token_ids, output.logprobs, strict=True):
        assert entry.logprob == close(row[token_id].logprob)
        assert bytes(entry.bytes) == llm.tokenizer.token_bytes(token_id), "also of a part of a character"
        assert [one.logprob for one in entry.top_logprobs] == close(
            sorted((one.logprob for one in row.values() if one.rank <= 2), reverse=True)
        )


def test_parts_and_roles(server: Running, llm: LLM) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be brief", "name": None}, {"role": "user", "content": parts}]
    same = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    found = server.post("/v1/chat/completions", body).json()
    assert found["prompt_token_ids"] == llm.chat_prompt(same)["prompt_token_ids"]


def test_a_final_message_goes_on(server: Running, llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "max_tokens": 4, "continue_final_message": True, **DRAWN, "return_token_ids": True}
    found = server.post("/v1/chat/completions", body).json()
    expected = llm.chat_prompt(messages, continue_final_message=True, add_generation_prompt=False)
    assert found["prompt_token_ids"] == expected["prompt_token_ids"]
    both = {**body, "add_generation_prompt": True}
    error_of(server.post("/v1/chat/completions", both), 400, "continue_final_message")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}] * 10000}, "tools"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 300}, "top_logprobs"),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {
                "messages": HELLO,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "square"}},
                },
            },
            "response_format.json_schema",
        ),
        ({"messages": [{"role": "user", "content": "x " * 2100}]}, "messages"),
    ],
)
def test_what_is_refused(server: Running, body: dict[str, Any], param: str) -> None:
    error_of(server.post("/v1/chat/completions", body), 400, param)


def test_arguments_of_tool_calls_are_decoded(server: Running) -> None:
    """As text, which OpenAI sends, they must be an object; what is not JSON is refused by name."""

    def asked(arguments: Any) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [*HELLO, {"role": "assistant", "content": "x", "tool_calls": [call]}]
        messages.append({"role": "tool", "tool_call_id": "1", "content": "3"})
        return server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})

    assert asked('{"a": 1}').status_code == asked({"a": 1}).status_code == asked("").status_code == 200
    field = "messages[2].tool_calls[0].function.arguments"
    for wrong in ("{", "[1]", 5, '{"a": NaN}', "[" * 100000):
        error_of(asked(wrong), 400, field)
