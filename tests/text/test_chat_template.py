"""Chat templates against transformers: the same template and messages must give the same prompt, to the character."""
# ruff: noqa: E501  (templates read best on one line)

from __future__ import annotations

import json
import threading
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

from . import tiny

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ date ~ '\\n\\n' ~ system ~ '<|eot_id|>' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}{{ call.function.arguments | tojson }}{{ '}' }}
        {%- endfor %}
        {{- '<|eom_id|>' }}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

MISTRAL = """{{ bos_token }}
{%- set ns = namespace(system='', turns=0) -%}
{%- for message in messages -%}
{% if message.role == 'system' %}
{% set ns.system = ns.system ~ message.content %}
{% elif message.role == 'user' %}
{% set ns.turns = ns.turns + 1 %}
[INST] {% if loop.last and ns.system %}{{ ns.system + '\\n\\n' }}{% endif %}{{ message.content }} [/INST]
{% elif message.role == 'assistant' %}
{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception('Only user, system and assistant roles are supported!') }}
{% endif %}
{% if ns.turns > 20 %}{% break %}{% endif %}
{%- endfor -%}
"""

HELPERS = """{%- macro join(items, sep=', ') -%}
    {%- for item in items %}{{ item }}{{ sep if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- set seen = {'a': 1, 'b': [1, 2, (3, 4)], 'html': '<a href="x">&</a>'} -%}
{{ seen | tojson }}|{{ seen | tojson(indent=2) }}|{{ ['ä', '😀'] | tojson(ensure_ascii=true) }}|
{{- messages | map(attribute='role') | unique | list | join('/') }}|{{ join(messages | map(attribute='content') | list) }}|
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ '%s-%05.1f' | format('x', 2.5) }}|
{{- '{:>8}'.format('r') }}|{{ 'abc'[::-1] }}|{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 1 / 4 }}|{{ 'ab' * 3 }}|
{{- [1] + [2, 3] }}|{{ dict(x=1).items() | list }}|{{ 'a,b,,c'.split(',') }}|{{ 'x y'.title().replace(' ', '_') }}|
{%- for a, b in [(1, 2), (3, 4)] recursive %}{{ loop.index }}:{{ a }}{{ b }}{{ loop.length }} {% else %}none{% endfor %}
{%- for key, value in {'b': 2, 'a': 1} | dictsort %}{{ key }}={{ value }};{% endfor %}
{%- set text %}block {{ 1 + 1 }}{% endset %}{{ text | upper | indent(2, true) }}|{{ missing is defined }}|{{ missing }}|{{ none }}
{%- filter upper %} filtered {% endfilter %}{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}
{%- for x in range(3) if x != 1 %}{{ x }}{{ loop.last }}{% endfor %}{{ custom | default('no custom') }}|{{ true and 1 }}
"""

CHAT = [
    {"role": "user", "content": "Hi <|there|> \n"},
    {"role": "assistant", "content": " Hello, wörld 😀 {{ not.a.template }}"},
    {"role": "user", "content": "  And then?\n\n"},
]
SYSTEM = {"role": "system", "content": "You are terse. "}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "d": "<é> & 'q'"}}}]
CALLS = [
    *CHAT[:1],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]},
    {"role": "tool", "content": "42"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    theirs, _ = tiny.byte_level("gpt-2", vocab_size=600)
    return PreTrainedTokenizerFast(tokenizer_object=theirs.backend_tokenizer, **SPECIAL)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [CHAT, [SYSTEM, *CHAT], CHAT[:1], [SYSTEM, *CHAT, *CHAT[1:], *CHAT[1:]]])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, HELPERS])
def test_equals_transformers(
    oracle: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]], generate: bool
) -> None:
    template = ChatTemplate(source, **SPECIAL)
    for extra in ({}, {"tools": TOOLS}, {"custom": {"a": [1, "x"]}}):
        theirs = oracle.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=generate, **extra
        )
        assert template.render(messages, add_generation_prompt=generate, **extra) == theirs
    assert len(theirs) > 20


def test_tool_calls_equal_transformers(oracle: PreTrainedTokenizerFast) -> None:
    theirs = oracle.apply_chat_template(CALLS, chat_template=LLAMA3, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(LLAMA3, **SPECIAL).render(CALLS) == theirs


@pytest.mark.parametrize("content", ["The answer is", "Trailing space ", " both \n", "\n"])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL])
def test_continuing_the_final_message_equals_transformers(
    oracle: PreTrainedTokenizerFast, source: str, content: str
) -> None:
    """Templates that trim and such that do not; the end of the turn must be cut off."""
    messages = [*CHAT[:1], {"role": "assistant", "content": content}]
    theirs = oracle.apply_chat_template(messages, chat_template=source, tokenize=False, continue_final_message=True)
    ours = ChatTemplate(source, **SPECIAL).render(messages, continue_final_message=True)
    assert ours == theirs
    assert ours.rstrip().endswith(content.strip())


def test_continuing_needs_a_final_message_that_is_shown() -> None:
    with pytest.raises(InvalidRequestError, match=r"^continue_final_message: .*not write the final message"):
        ChatTemplate("{{ messages[0].role }}").render(CHAT, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="together with add_generation_prompt"):
        ChatTemplate(CHATML).render(CHAT, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="no content to continue"):
        ChatTemplate(CHATML).render(CALLS[:2], continue_final_message=True)


@pytest.mark.smollm2
def test_smollm2_template(smollm2: Tokenizer, smollm2_path: Path) -> None:
    assert smollm2.chat_template is not None
    text = ChatTemplate(smollm2.chat_template, **smollm2.special_tokens).render(CHAT[:1])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi <|there|> \n<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm2.encode(text, add_special_tokens=False)
    assert ids.count(1) == 3
    assert ids.count(2) == 2


def test_time_of_day() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %H') }}", now=lambda: datetime(2024, 2, 29, 13))
    assert template.render(CHAT) == "2024-02-29 13"


PARTS = [{"type": "text", "text": " one "}, {"type": "text", "text": "two", "cache_control": None}]
IN_PARTS = """{{ bos_token }}{% for message in messages %}<{{ message.role }}>
{%- if message.content is string %}{{ message.content | trim }}
{%- else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}
{%- endif %}</>{% endfor %}"""
ONLY_PARTS = """{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}</>{% endfor %}"""
ONLY_TEXTS = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}|{% endfor %}"
USERS_PARTS = """{% for message in messages %}<{{ message.role }}>{% if message.role == 'user' %}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
{%- else %}{{ message.content + '' }}{% endif %}</>{% endfor %}"""


@pytest.mark.parametrize("note", ["", "{# text #}"])  # one that names the key of a part is tried
def test_text_parts_are_joined_where_the_template_wants_a_string(note: str) -> None:
    for source, expected in (("content", " one \ntwo"), ("content | tojson", json.dumps(" one \ntwo"))):
        template = ChatTemplate(f"{note}{{{{ messages[0].{source} }}}}")
        assert template.render([{"role": "user", "content": PARTS}]) == expected
        assert template.render([{"role": "user", "content": []}]) == expected[:1].strip() * 2


@pytest.mark.parametrize("source", [IN_PARTS, ONLY_PARTS, ONLY_TEXTS])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_text_parts_reach_a_template_that_goes_through_them(
    oracle: PreTrainedTokenizerFast, source: str, role: str
) -> None:
    messages = [{"role": role, "content": PARTS}, {"role": "user", "content": PARTS[:1]}]
    theirs = oracle.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, **SPECIAL).render(messages, add_generation_prompt=False) == theirs
    assert "two" in theirs and "\n" not in theirs


def test_text_goes_as_a_part_to_a_template_that_knows_no_other() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PARTS}]
    assert ChatTemplate(ONLY_PARTS).render(messages) == "<user>Hi</><assistant> one two</>"


def test_each_role_has_its_own_form() -> None:
    messages = [{"role": role, "content": PARTS} for role in ("system", "user")]
    assert ChatTemplate(USERS_PARTS).render(messages) == "<system> one \ntwo</><user> one two</>"


def test_the_last_part_of_the_final_message_is_continued(oracle: PreTrainedTokenizerFast) -> None:
    messages = [*CHAT[:1], {"role": "assistant", "content": PARTS}]
    theirs = oracle.apply_chat_template(messages, chat_template=IN_PARTS, tokenize=False, continue_final_message=True)
    assert ChatTemplate(IN_PARTS, **SPECIAL).render(messages, continue_final_message=True) == theirs
    assert theirs.endswith("onetwo")


# --- null and absent ---

PLAIN = "{% for m in messages %}[{{ m.content }}{{ m.name }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}]{% endfor %}"


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_without_content_writes_none(content: dict[str, Any]) -> None:
    call = {"id": None, "function": {"name": "f", "description": None, "arguments": {"x": None}}}
    chat = [*CHAT[:1], {"role": "assistant", "name": None, "tool_calls": [call]} | content]
    expected = '{"function": {"name": "f", "arguments": {"x": null}}}'
    assert ChatTemplate(PLAIN).render(chat).endswith(f"[{expected}]")


def test_null_keys_of_tools_and_documents() -> None:
    source = "{{ tools | tojson }} {{ documents | tojson }}{{ flag is none }}"
    schema = {"type": "object", "properties": {"x": {"default": None}}}
    tools = [{"type": "function", "strict": None, "function": {"name": "f", "description": None, "parameters": schema}}]
    text = ChatTemplate(source).render(CHAT, tools=tools, documents=[{"title": None, "text": "t"}], flag=None)
    kept = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert text == f"{json.dumps([kept])} {json.dumps([{'text': 't'}])}True"


@pytest.mark.parametrize("content", [{}, {"content": None}])
@pytest.mark.parametrize("of", ["message.content", "message['content']"])
def test_a_template_that_asks_for_null_finds_it(content: dict[str, Any], of: str) -> None:
    source = f"{{% for message in messages %}}{{% if {of} is none %}}call{{% else %}}{{{{ {of} }}}}{{% endif %}}{{% endfor %}}"
    chat = [{"role": "user", "content": "Hi, "}, {"role": "assistant", "tool_calls": [{"id": "1"}]} | content]
    assert ChatTemplate(source).render(chat) == "Hi, call"


def test_unknown_roles_reach_the_template() -> None:
    assert ChatTemplate("{{ messages[0].role }}").render([{"role": "critic", "content": ""}]) == "critic"
    with pytest.raises(InvalidRequestError, match=r"^messages: .*Only user, system and assistant roles"):
        ChatTemplate(MISTRAL, **SPECIAL).render([{"role": "critic", "content": ""}])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (None, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([*CHAT, {"role": "user"}], "messages[3].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", 5: "y"}], "messages[0]"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages[0]"),
    ],
)
def test_malformed_messages(messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.field == field


def test_nested_beyond_reason() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    cyclic: list = []
    cyclic.append(cyclic)
    for value in (deep, cyclic):
        with pytest.raises(InvalidRequestError, match="nested more than"):
            ChatTemplate(CHATML).render([{"role": "user", "content": "x", "extra": value}])


RESERVED = ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "bos_token", "raise_exception"]


@pytest.mark.parametrize("key", [*RESERVED, "namespace", "loop", "self", "__class__", "_x", "range"])
def test_reserved_arguments(key: str) -> None:
    """A request must not replace what the engine or the template language means by a name."""
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(CHATML, **SPECIAL).render(CHAT, chat_template_kwargs={key: True})
    assert caught.value.field == f"chat_template_kwargs.{key}"


def test_reserved_keyword_arguments() -> None:
    for key in ("messages", "self", "tokenize"):
        with pytest.raises(InvalidRequestError, match=rf"^chat_template_kwargs\.{key}: "):
            ChatTemplate(CHATML).render(CHAT, **{key: True})


def test_arguments_are_plain_data() -> None:
    class Flavour(StrEnum):
        SWEET = "sweet"

    template = ChatTemplate("{{ flavour }} {{ data | tojson }}")
    assert template.render(CHAT, flavour=Flavour.SWEET, data=(1, True, 2.5, None)) == "sweet [1, true, 2.5, null]"
    with pytest.raises(InvalidRequestError, match=r"^chat_template_kwargs\.data: "):
        template.render(CHAT, data=Path())


def test_the_messages_given_are_not_changed() -> None:
    messages = json.loads(json.dumps([SYSTEM, *CHAT]))
    ChatTemplate(LLAMA3, **SPECIAL).render(messages, continue_final_message=True)
    assert messages == [SYSTEM, *CHAT]


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ x", "{% endif %}", "{{ x | nofilter }}", "{% include 'x' %}{% for %}", "{{ 1 / 0 | bad }}"],
)
def test_templates_that_are_not_valid(source: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        ChatTemplate(source, path="model.gguf")
    assert caught.value.field == "chat_template"
    assert caught.value.path == "model.gguf"


@pytest.mark.parametrize(
    "source", ["{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% include 'x' %}", "{{ x() }}"]
)
def test_templates_that_fail_fail_the_request(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^messages: the chat template"):
        ChatTemplate(source).render(CHAT)


def test_threads_share_a_template() -> None:
    """Each rendering has its own limits and variables."""
    template = ChatTemplate(CHATML)
    expected = {n: template.render([{"role": "user", "content": f"message {n}"}]) for n in range(8)}
    wrong = []

    def work(n: int) -> None:
        for _ in range(50):
            if template.render([{"role": "user", "content": f"message {n}"}]) != expected[n]:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_long_conversations_are_no_attack() -> None:
    """The limits must leave room for real ones: 4 MB of messages, gathered in a namespace."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.role ~ m.content | trim %}"
        "{% endfor %}{{ ns.text }}"
    )
    messages = [{"role": "user", "content": "x" * 10_000} for _ in range(400)]
    assert len(ChatTemplate(source).render(messages)) == 400 * 10_004
    assert len(ChatTemplate(CHATML).render(messages * 5)) > 400 * 10_000 * 5
