"""Texts of any length through every door that encodes them: what is looked at depends on the context alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.core.errors import InvalidRequestError
from octavo.text.added_tokens import AddedTokens
from octavo.text.model_tokens import ModelTokens
from octavo.text.score_bpe import ScoreBPE
from octavo.text.tokenizer import Tokenizer

CONTEXT = 64
LONG = "\u4e2d" * 100_000
WITHIN = re.escape("its first 4608 characters have")


class Looking(Tokenizer):
    """Keeps the lengths of the texts that it is given."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.lengths: list[int] = []

        def looking(text: str, _special: bool) -> list[int]:
            self.lengths.append(len(text))
            return encode(text)

        super().__init__(
            encode=looking, token_text=lambda n: "x", to_bytes=lambda text, n: b"x", vocab_size=300,
            special_token_ids=(), special_tokens={}, bos_token_id=None, eos_token_ids=(), strip_leading_space=False,
            chat_templates={},
        )  # fmt: skip


def one_each(text: str) -> list[int]:
    return [1] * len(text)


def test_texts_that_may_fit_are_not_looked_at_twice() -> None:
    codec = Looking(one_each)
    ModelTokens(codec, 300).check_beginning("prompt", "a" * 4608, CONTEXT)
    assert codec.lengths == []


@pytest.mark.parametrize("length", [100_000, 10_000_000])
def test_what_is_looked_at_does_not_depend_on_the_length(length: int) -> None:
    codec = Looking(one_each)
    with pytest.raises(InvalidRequestError) as caught:
        ModelTokens(codec, 300).check_beginning("messages[1]", "a" * length, CONTEXT)
    assert codec.lengths == [4608]
    assert str(caught.value) == (
        f"messages[1]: its first 4608 characters have 4608 tokens, and there are {length} characters; "
        "max_model_len is 64"
    )


def test_texts_of_few_tokens_are_looked_at_further() -> None:
    codec = Looking(lambda text: [1] * (len(text) // 1000))
    ModelTokens(codec, 300).check_beginning("prompt", "a" * 30_000, CONTEXT)
    assert codec.lengths == [4608, 9216, 18432]


def test_spaces_that_a_token_after_them_swallows() -> None:
    """As added tokens with lstrip do: the whole text is one token, and its beginning thousands."""
    codec = Looking(lambda text: one_each(re.sub(r"\s*<mask>", "m", text)))
    text = " " * 20_000 + "<mask>"
    assert len(codec.encode(text)) == 1
    ModelTokens(codec, 300).check_beginning("prompt", text, CONTEXT)


def test_characters_without_tokens_that_become_one() -> None:
    encoder = ScoreBPE({"a": 1}, [0.0, 0.0], AddedTokens({}), None, 0, add_space_prefix=False)
    codec = Looking(encoder.encode)
    text = "b" * 50_000
    assert len(codec.encode(text)) == 1
    ModelTokens(codec, 300).check_beginning("prompt", text, CONTEXT)


def test_a_long_token_that_the_cut_falls_into() -> None:
    token = "b" * 4096
    codec = Looking(lambda text: one_each(text.replace(token, "t").replace("a" * 100, "a")))
    text = "a" * 600 + token * 2
    assert len(codec.encode(text)) < CONTEXT
    ModelTokens(codec, 300).check_beginning("prompt", text, CONTEXT)


@pytest.fixture(scope="module")
def llm(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), max_model_len=CONTEXT) as llm:
        yield llm


def extend(llm: LLM) -> None:
    with llm.session() as s:
        s.extend("a")
        s.extend(LONG)


def begin(llm: LLM) -> None:
    with llm.session() as s:
        s.extend(LONG)


def select(llm: LLM) -> None:
    with llm.session() as s:
        s.extend("a")
        s.select(["b", LONG])


MESSAGES = [{"role": "user", "content": LONG}]
DOORS: dict[str, tuple[str, Callable[[LLM], Any]]] = {
    "generate": ("prompts[1]", lambda llm: llm.generate(["a", LONG])),
    "stream": ("prompt", lambda llm: llm.stream(LONG)),
    "beam_search": ("prompt", lambda llm: llm.beam_search(LONG)),
    "explain_cache": ("prompt", lambda llm: llm.explain_cache(LONG)),
    "chat": ("messages", lambda llm: llm.chat(MESSAGES)),
    "chat_prompt": ("messages", lambda llm: llm.chat_prompt(MESSAGES)),
    "begin": ("prompt", begin),
    "extend": ("prompt", extend),
    "select": ("choices[1]", select),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_by_the_beginning(llm: LLM, door: str) -> None:
    field, go = DOORS[door]
    with pytest.raises(InvalidRequestError, match=WITHIN) as caught:
        go(llm)
    assert caught.value.field == field


def test_the_async_door(tiny_llama_dir: Path) -> None:
    async def run() -> None:
        llm = AsyncLLM(str(tiny_llama_dir), max_model_len=CONTEXT)
        try:
            with pytest.raises(InvalidRequestError, match=WITHIN):
                async for _ in llm.generate(LONG, SamplingParams(max_tokens=1)):
                    pass
        finally:
            llm.close()

    asyncio.run(run())


def test_many_long_bad_words(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"^bad_words: have 69632 characters together; 65536 are allowed"):
        llm.generate("a", SamplingParams(bad_words=["ab" * 2048] * 17))
