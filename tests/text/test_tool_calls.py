"""Calls of tools in outputs, however they are cut; what is none is text, and nothing is lost."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from octavo.text.tool_calls import (
    ANY_TEXT,
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    TextDelta,
    ToolCall,
    ToolCallParser,
    ToolCalls,
    call_grammar,
    format_of,
    parse,
)

NAMES = ["get_weather", "add"]
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris", "note": "} \\" </tool_call> {"}}'
ADD = '{"name": "add", "arguments": {"a": [1, {"b": 2}], "c": null}}'
PARIS = '{"city": "Paris", "note": "} \\" </tool_call> {"}'
SUM = '{"a": [1, {"b": 2}], "c": null}'

HERMES: list[tuple[str, str, list[ToolCall]]] = [
    ("Hello.", "Hello.", []),
    (f"<tool_call>\n{ADD}\n</tool_call>", "", [ToolCall("add", SUM)]),
    (f"Let me see.\n<tool_call>{WEATHER}</tool_call>", "Let me see.", [ToolCall("get_weather", PARIS)]),
    (
        f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>",
        "",
        [ToolCall("get_weather", PARIS), ToolCall("add", SUM)],
    ),
    (f"<tool_call>{ADD}</tool_call> Done.", "Done.", [ToolCall("add", SUM)]),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),  # type: ignore[list-item] # as it is
    ("<tool_call>no JSON</tool_call>", None, []),  # type: ignore[list-item]
    ("a < b and <tool", "a < b and <tool", []),
    ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [ToolCall("add", '{"a": 1')]),  # cut by max_tokens
    ('<tool_call>{"name": "ad', None, []),  # type: ignore[list-item]
    ('<tool_call>{"arguments": {}, "name": "add"}</tool_call>', None, []),  # type: ignore[list-item]
    ('<tool_call>{"name": "add", "arguments": "text"}</tool_call>', None, []),  # type: ignore[list-item]
    ("", "", []),
]
LLAMA: list[tuple[str, str, list[ToolCall]]] = [
    ("Hello {there}.", "Hello {there}.", []),
    (ADD.replace("arguments", "parameters"), "", [ToolCall("add", SUM)]),
    ("<|python_tag|>" + ADD.replace("arguments", "parameters"), "", [ToolCall("add", SUM)]),
    (
        f"{WEATHER}; {ADD}".replace("arguments", "parameters"),
        "",
        [ToolCall("get_weather", PARIS), ToolCall("add", SUM)],
    ),
    ('{"type": "function", "name": "add", "parameters": {}}', "", [ToolCall("add", "{}")]),
    ('{"answer": 5}', '{"answer": 5}', []),
    ("{", "{", []),
    ("", "", []),
]


def in_pieces(form: str, text: str, rng: random.Random) -> ToolCalls:
    parser, found = ToolCallParser(form, NAMES), ToolCalls()
    while text:
        size = rng.randint(1, 9)
        found.add(parser.feed(text[:size]))
        text = text[size:]
    found.add(parser.finish())
    return found


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [("hermes", *one) for one in HERMES] + [("llama3_json", *one) for one in LLAMA],
)
def test_however_it_is_cut(form: str, text: str, content: str | None, calls: list[ToolCall]) -> None:
    rng = random.Random(1)
    for found in (parse(form, text, NAMES), *(in_pieces(form, text, rng) for _ in range(50))):
        assert found.calls == calls
        assert found.text == (text if content is None else content)
    for call in calls:
        if not text.endswith('"a": 1'):
            json.loads(call.arguments)


def test_deltas_come_as_soon_as_they_are_sure() -> None:
    parser = ToolCallParser("hermes", NAMES)
    assert parser.feed("Hi <") == [TextDelta("Hi")]
    assert parser.feed("b> <tool_call>") == [TextDelta(" <b>")]
    assert parser.feed('{"name": "add", "argu') == []
    assert parser.feed('ments": {"a"') == [CallBegun(0, "add"), ArgumentsDelta(0, '{"a"')]
    assert parser.feed(": 1}") == [ArgumentsDelta(0, ": 1}"), CallEnded(0)]
    assert parser.feed("}</tool_call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
def test_noise_is_text_or_calls(form: str) -> None:
    """Whatever comes: no error, and in time of its length."""
    rng = random.Random(2)
    parts = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        ":",
        '"add"',
        ",",
        '"arguments"',
        '"parameters"',
        "\\",
        '"',
    ]
    for _ in range(2000):
        in_pieces(form, "".join(rng.choices(parts, k=rng.randint(0, 30))), rng)
    parse(form, "<tool_call>" * 20_000, NAMES)
    parse(form, "{" * 100_000, NAMES)
    parse(form, '<tool_call>{"name": "' + "\\" * 100_000, NAMES)


def test_formats_are_known_by_their_templates() -> None:
    assert format_of('{%- if tools %}<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}') == "hermes"
    assert format_of('{"name": function name, "parameters": dictionary} <|python_tag|>') == "llama3_json"
    assert format_of("{% for message in messages %}{{ message.content }}{% endfor %}") is None


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
@pytest.mark.parametrize("several", [True, False])
def test_a_grammar_of_calls(form: str, several: bool, tiny_llama_dir: Any) -> None:
    """What it lets through is what the parser finds, with arguments that fit the schema."""
    from octavo import LLM, SamplingParams

    tools = [
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}},
        {"name": 'q"uote', "parameters": {"type": "object", "additionalProperties": False}},
    ]
    grammar = call_grammar(form, tools, several=several)
    with LLM(str(tiny_llama_dir), max_model_len=512) as llm:
        params = SamplingParams(n=6, seed=1, max_tokens=200, structured_outputs={"grammar": grammar})
        (output,) = llm.generate("A", params, use_tqdm=False)
    whole = [one.text for one in output.outputs if one.finish_reason == "stop"]
    assert whole
    for text in whole:
        found = parse(form, text, ["add", 'q"uote'])
        assert found.calls and found.text == "" and (several or len(found.calls) == 1)
        for call in found.calls:
            arguments = json.loads(call.arguments)
            assert arguments == {} if call.name != "add" else arguments["a"] in (1, 2)


CALL = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": {"a": 1}}',
}


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("beside", [None, ANY_TEXT, '{"type": "array"}'])
def test_what_may_stand_beside_calls(form: str, several: bool, beside: str | None) -> None:
    """Text as the form has it, or an answer of JSON; the calls fit their schemas, and are no more than may be."""
    import llguidance

    call, other = CALL[form], CALL[form].replace("add", "any")
    between = "\n" if form == "hermes" else "; "
    text, mixed = beside == ANY_TEXT, beside == ANY_TEXT and form == "hermes"
    cases = {
        "": text,
        "Hello\n{there} <tool": text,
        "[1, 2]": beside is not None,
        call: True,
        other: True,
        call + between + other: several,
        f"Well.\n{call}": text,
        f"{call} So.": mixed and several,
        call.replace("1", '"1"'): False,
        call.replace('{"a": 1}', "{}"): False,
        call.replace("add", "subtract"): False,
    }
    if form == "llama3_json":
        cases |= {"Well, {": text, '{"b": 1}': False, ' {"b": 1}': False}
    schema = {"type": "object", "properties": {"a": {"type": "integer", "description": "a ::= b"}}, "required": ["a"]}
    tools: list[dict[str, Any]] = [{"name": "add", "parameters": schema}, {"name": "any", "parameters": None}]
    grammar = call_grammar(form, tools, several=several, beside=beside)
    assert "::=" not in grammar, "it would be taken for the form of llama.cpp"
    tokenizer = llguidance.LLTokenizer("byte")
    for output, expected in cases.items():
        matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("lark", grammar))
        assert not matcher.is_error(), matcher.get_error()
        token_ids = tokenizer.tokenize_str(output)
        found = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
        assert found == expected, output
