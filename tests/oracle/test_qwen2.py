"""Qwen2.5-Coder 0.5B Instruct against transformers on the same dequantised weights: answers, tokens, conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.formats import GGUFFile
from octavo.text.gguf_vocab import tokenizer_from_gguf
from tests.models.probe import Probe
from tests.oracle.compare import Tally
from tests.oracle.oracle import all_logits, load_model, load_tokenizer
from tests.oracle.prompts import CODE, LANGUAGES, PROSE, SHORT, chat
from tests.text.corpus import corpus
from tests.text.test_real_templates import ours, theirs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# fmt: off
PROMPTS = (
    SHORT[0], SHORT[4], CODE[0], CODE[4], LANGUAGES[5], LANGUAGES[8], PROSE[0],
    chat("Write a function that reverses a linked list."),
)
# fmt: on


@pytest.fixture(scope="module")
def theirs_of(qwen2_path: Path) -> Any:
    return load_tokenizer(qwen2_path)


def test_greedy_answers(qwen2_path: Path, theirs_of: Any) -> None:
    """Guards against biases, a rope base, a head of its own and formats that are right on tiny models only."""
    probe, model, tally = Probe(qwen2_path), load_model(qwen2_path), Tally()
    assert probe.config.architecture == "qwen2" and not probe.config.tie_embeddings
    for text in PROMPTS:
        token_ids = theirs_of(text).input_ids
        chosen, rows = probe.greedy(token_ids, 32)
        expected = all_logits(model, token_ids + chosen[:-1], first=len(token_ids) - 1)
        tally.rows(rows, expected)
        tally.choices(chosen, rows, expected)
    print(f"worst {tally.worst:.2e}, excused {len(tally.excused)} of {tally.tokens}")
    assert tally.tokens == 32 * len(PROMPTS) and not tally.excused


def test_tokens(qwen2_path: Path, theirs_of: Any) -> None:
    """Guards against another way of splitting digits, words and accents than the real vocabulary was made with."""
    with GGUFFile(qwen2_path) as file:
        tokenizer = tokenizer_from_gguf(file.metadata, qwen2_path)
    strings = [*corpus(), *PROSE, *CODE, *LANGUAGES, *PROMPTS, "Caf\u00e9 <|im_end|> 123456"]
    assert len(strings) > 1000
    wrong = [text for text in strings if tokenizer.encode(text) != theirs_of.encode(text)]
    assert not wrong, f"{len(wrong)} strings differ, such as {wrong[:3]!r}"
    assert tokenizer.eos_token_ids == (151643, 151645)


def test_conversations_and_tools(theirs_of: Any) -> None:
    """The template of the file, conversation by conversation and with tools, as transformers renders it."""
    source = theirs_of.chat_template
    assert "<tools>" in source
    facts = theirs(source)
    assert ours(source) == facts
    assert sum(text != "-" for texts in facts.values() for text in texts.split()) > 50


def test_answers_on_the_cpu_backend(qwen2_path: Path) -> None:
    with LLM(str(qwen2_path), backend="cpu", max_model_len=256) as llm:
        params = SamplingParams(max_tokens=24, temperature=0)
        (output,) = llm.generate(["def is_even(n):\n    return"], params, use_tqdm=False)
        (said,) = llm.chat([{"role": "user", "content": "Say the word hello and nothing else."}], params)
    assert output.outputs[0].text.lstrip().startswith("n % 2 == 0")
    assert "hello" in said.outputs[0].text.lower()
