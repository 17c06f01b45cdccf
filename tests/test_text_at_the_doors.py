"""Text through the doors of the library, with a SentencePiece tokenizer that puts a space before every text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from tests.test_llm import check_idle

BEGINNING = "a whale is a"


@pytest.fixture(scope="module")
def llm(tiny_sentencepiece_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_sentencepiece_dir), max_num_seqs=8) as llm:
        yield llm
        check_idle(llm)


def whole_less_beginning(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(BEGINNING + text)[len(llm.tokenizer.encode(BEGINNING)) :]


def test_sessions_put_no_spaces_between_pieces(llm: LLM) -> None:
    with llm.session() as s:
        s.extend(BEGINNING)
        result = s.select([" fish", " mammal"])
        for choice in result.choices:
            assert choice.token_ids == whole_less_beginning(llm, choice.text)
        assert len(result.choices[0].token_ids) == 1
        s.extend(" mammal")
        s.extend(" and a")
        assert s.token_ids == llm.tokenizer.encode(BEGINNING + " mammal and a")
        s.extend("nd then")  # across a border of tokens
        assert s.text == "<s> " + BEGINNING + " mammal and and then"


def test_a_token_cut_by_a_stop_string_leaves_no_space(llm: LLM) -> None:
    """What is left of the token goes on where it stood."""
    fish = whole_less_beginning(llm, " fish")
    params: dict[str, Any] = {"logit_bias": {fish[0]: 1e4}, "temperature": 0, "max_tokens": 8}
    with llm.session() as s:
        s.extend(BEGINNING)
        output = s.generate(**params, stop="sh")
        assert (output.text, output.stop_reason, output.token_ids) == (" fi", "sh", fish)
        assert s.text == f"<s> {BEGINNING} fi"
