"""A tokenizer made of the part of a vocabulary that a text can have is that of the whole vocabulary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from octavo.formats import open_weights
from octavo.text import gguf_vocab
from octavo.text.gguf_vocab import tokenizer_from_gguf
from tests.text.corpus import corpus


@pytest.fixture(scope="module")
def metadata(smollm2_path: Path) -> dict[str, Any]:
    with open_weights(smollm2_path) as file:
        return dict(file.metadata)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_the_same_ids(metadata: dict[str, Any], pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_vocab, "_FEW", 10_000)
    values = metadata | {"tokenizer.ggml.pre": pre}
    whole, needed = tokenizer_from_gguf(values), tokenizer_from_gguf(values, is_sound=True)
    rng = random.Random(0)
    texts = ["", " ", "a", "\n\n", *corpus()[:250]]
    everything = "".join(texts)
    for _ in range(60):
        start = rng.randrange(len(everything))
        texts.append(everything[start : start + rng.randint(1, 400)])
    texts.append("<|im_start|>user\nHi<|im_end|>\n" + texts[-1])
    for text in texts:
        for special in (True, False):
            assert needed.encode(text, special) == whole.encode(text, special)
    assert needed.vocab_size == whole.vocab_size and needed.eos_token_ids == whole.eos_token_ids
    assert needed.special_tokens == whole.special_tokens and needed.special_token_ids == whole.special_token_ids
    ids = range(0, whole.vocab_size, 97)
    assert [needed.token_bytes(n) for n in ids] == [whole.token_bytes(n) for n in ids]
    assert needed.token_bytes(whole.vocab_size + 5) == b""


def test_the_whole_vocabulary_comes_when_texts_are_many_or_long(
    metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    build = gguf_vocab.build_byte_level
    monkeypatch.setattr(gguf_vocab, "build_byte_level", lambda v, *a, **k: made.append(len(v)) or build(v, *a, **k))
    tokenizer = tokenizer_from_gguf(metadata, is_sound=True)
    assert not made, "nothing before the first text"
    for _ in range(6):
        tokenizer.encode("The quick brown fox")
    assert [size > 10_000 for size in made] == [False] * 3 + [True]
    made.clear()
    tokenizer = tokenizer_from_gguf(metadata, is_sound=True)
    tokenizer.encode("many words " * 400)
    tokenizer.encode("few")
    assert [size > 10_000 for size in made] == [True]
