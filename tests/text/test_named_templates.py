"""Which of several chat templates writes a conversation, against transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.core.errors import InvalidRequestError
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.named_templates import NamedTemplates

from . import tiny

SOURCES = {name: f"{{{{ bos_token }}}}{name}" for name in ("default", "tool_use", "rag")}
MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    fast = tiny.byte_level("gpt-2", vocab_size=300)[0].backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>")


@pytest.mark.parametrize("names", [("default",), ("default", "tool_use"), ("default", "rag"), ("tool_use",)])
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
@pytest.mark.parametrize("asked", [None, "default", "tool_use", "rag", "{{ bos_token }}own"])
def test_chooses_as_transformers(
    theirs: PreTrainedTokenizerFast, names: tuple[str, ...], tools: Any, asked: str | None
) -> None:
    sources = {name: SOURCES[name] for name in names}
    theirs.chat_template = sources  # type: ignore[assignment]
    ours = NamedTemplates(sources, {"bos_token": "<s>"})
    try:
        chosen = theirs.get_chat_template(asked, tools)
    except ValueError:
        chosen = asked or ""
    if "{{" in chosen:
        expected = chosen.replace("{{ bos_token }}", "<s>")
        assert ours.choose(asked, tools).render(MESSAGES, tools=tools) == expected
    else:  # a name that transformers takes for a template, or no default
        with pytest.raises(InvalidRequestError, match=re.escape(", ".join(map(repr, sorted(names))))) as caught:
            ours.choose(asked, tools)
        assert caught.value.field == "chat_template"


def test_a_model_without_any() -> None:
    for asked, field in (
        (None, "messages"),
        ("tool_use", "chat_template"),
        (5, "chat_template"),
        ("", "chat_template"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            NamedTemplates({}, {}).choose(asked, None)
        assert caught.value.field == field
    assert NamedTemplates({}, {}).choose("{{ messages[0].content }}", None).render(MESSAGES) == "x"


def test_gguf_files_with_several() -> None:
    metadata = tiny.byte_level("gpt-2", vocab_size=300)[1] | {
        "tokenizer.chat_templates": ["tool_use", "rag"],
        "tokenizer.chat_template.tool_use": SOURCES["tool_use"],
        "tokenizer.chat_template.rag": SOURCES["rag"],
    }
    others = {name: SOURCES[name] for name in ("tool_use", "rag")}
    assert tokenizer_from_gguf(metadata).chat_templates == others
    ours = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": SOURCES["default"]})
    assert (ours.chat_templates, ours.chat_template) == (SOURCES, SOURCES["default"])
