"""Calls of tools over HTTP: demanded, chosen, streamed, and sent back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from octavo.server import chat_output

from .conftest import Running, error_of, serving

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"
    'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    },
}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    with serving(folder) as running:
        yield running


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


def test_what_a_reader_makes_of_pieces() -> None:
    reader = chat_output.reader_for("hermes", [ADD])
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
        ({"parallel_tool_calls": False, "tools": [ADD]}, "parallel_tool_calls"),
        ({"tool_choice": "required", "tools": [ADD], "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_refused(server: Running, given: dict[str, Any], param: str) -> None:
    error_of(server.post("/v1/chat/completions", {"messages": HELLO, **given}), 400, param)
    server.until_idle()
