"""Broken tokenizer metadata: an error that names the key, never a crash or a tokenizer that is subtly wrong."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.text import gguf_vocab
from octavo.text.gguf_vocab import tokenizer_from_gguf

from . import tiny

_ABSENT = object()


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    return tiny.byte_level("smollm", vocab_size=600)[1]


@pytest.fixture(scope="module")
def scored() -> dict[str, Any]:
    return tiny.scored(1, add_space_prefix=True)[1]


def _error(metadata: dict[str, Any], key: str, value: Any) -> ModelFormatError:
    changed = {**metadata, f"tokenizer.{key}": value}
    if value is _ABSENT:
        del changed[f"tokenizer.{key}"]
    with pytest.raises(ModelFormatError) as caught:
        tokenizer_from_gguf(changed, path="model.gguf")
    assert caught.value.path == "model.gguf"
    return caught.value


def test_too_many_tokens(scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file of empty strings that takes many times its size."""
    monkeypatch.setattr(gguf_vocab, "MAX_TOKENS", len(scored["tokenizer.ggml.tokens"]) - 1)
    with pytest.raises(ModelFormatError, match=r"ggml\.tokens: \d+ tokens; \d+ are allowed"):
        tokenizer_from_gguf(scored, path="model.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ggml.model", _ABSENT),
        ("ggml.model", 3),
        ("ggml.pre", 7),
        ("ggml.tokens", _ABSENT),
        ("ggml.tokens", []),
        ("ggml.tokens", "abc"),
        ("ggml.tokens", 5),
        ("ggml.tokens", [1, 2, 3]),
        ("ggml.tokens", np.arange(10)),
        ("ggml.tokens", ["ab\udc80"]),
        ("ggml.token_type", [1, 2]),
        ("ggml.token_type", ["1"]),
        ("ggml.merges", _ABSENT),
        ("ggml.merges", ["a"]),
        ("ggml.merges", ["a b c"]),
        ("ggml.merges", [""]),
        ("ggml.merges", ["notatoken alsonot"]),
        ("ggml.merges", ["! Ġ"]),  # both tokens exist, what they make does not
        ("ggml.merges", [1]),
        ("ggml.eot_token_id", 1.5),
        ("ggml.unknown_token_id", True),
        ("ggml.padding_token_id", "0"),
        ("ggml.add_eos_token", 1),
        ("chat_template", 5),
    ],
)
def test_byte_level(byte_level: dict[str, Any], key: str, value: Any) -> None:
    assert _error(byte_level, key, value).field == f"tokenizer.{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ggml.scores", _ABSENT),
        ("ggml.scores", [0.0]),
        ("ggml.scores", ["x"]),
        ("ggml.add_space_prefix", "yes"),
        ("ggml.bos_token_id", 2**32 - 1),
    ],
)
def test_scored(scored: dict[str, Any], key: str, value: Any) -> None:
    assert _error(scored, key, value).field == f"tokenizer.{key}"


IDS = ["unknown_token_id", "seperator_token_id", "padding_token_id", "mask_token_id", "eot_token_id", "eom_token_id"]


@pytest.mark.parametrize("key", [*IDS, "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("beyond", [0, 2**32 - 1, -1])
def test_ids_of_tokens_that_are_not_there(
    byte_level: dict[str, Any], key: str, beyond: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Files say so of tokens that they do not use, such as padding: as good as nothing, and worth a word."""
    count = len(byte_level["tokenizer.ggml.tokens"])
    key, value = f"tokenizer.ggml.{key}", beyond or count
    ours = tokenizer_from_gguf({**byte_level, key: value}, path="m.gguf")
    assert caplog.messages == [f"m.gguf: {key} is {value} and there are {count} tokens: it is taken for absent"]
    without = tokenizer_from_gguf({k: v for k, v in byte_level.items() if k != key})
    assert ours.special_tokens == without.special_tokens
    assert ours.eos_token_ids == without.eos_token_ids
    assert ours.encode("a <|im_end|>") == without.encode("a <|im_end|>")


def test_ids_of_tokens_that_are_needed_must_be_there(byte_level: dict[str, Any], scored: dict[str, Any]) -> None:
    for flag, key in (("add_bos_token", "bos_token_id"), ("add_eos_token", "eos_token_id")):
        wanted = {**byte_level, f"tokenizer.ggml.{flag}": True}
        assert key in str(_error(wanted, f"ggml.{key}", 10**9))
    types = [1 if kind == 6 else kind for kind in scored["tokenizer.ggml.token_type"]]
    no_bytes = {**scored, "tokenizer.ggml.token_type": types}
    assert "unknown_token_id" in str(_error(no_bytes, "ggml.unknown_token_id", 10**9))


@pytest.mark.parametrize("key", ["pre", "token_type"])
def test_what_is_guessed_is_said(byte_level: dict[str, Any], key: str, caplog: pytest.LogCaptureFixture) -> None:
    key = f"tokenizer.ggml.{key}"
    assert tokenizer_from_gguf(byte_level).encode("a")
    assert not caplog.records
    assert tokenizer_from_gguf({k: v for k, v in byte_level.items() if k != key}, path="m.gguf").encode("a")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(f"m.gguf: no {key}: ")


def test_duplicate_tokens(byte_level: dict[str, Any], scored: dict[str, Any]) -> None:
    for metadata in (byte_level, scored):
        tokens = list(metadata["tokenizer.ggml.tokens"])
        tokens[-1] = tokens[300]
        assert "more than once" in str(_error(metadata, "ggml.tokens", tokens))


def test_empty_tokens_are_padding(byte_level: dict[str, Any]) -> None:
    metadata = dict(byte_level)
    metadata["tokenizer.ggml.tokens"] = [*byte_level["tokenizer.ggml.tokens"], "", ""]
    metadata["tokenizer.ggml.token_type"] = [*byte_level["tokenizer.ggml.token_type"], 3, 4]
    padded, plain = tokenizer_from_gguf(metadata), tokenizer_from_gguf(byte_level)
    assert padded.encode("a b <|im_end|>") == plain.encode("a b <|im_end|>")
    assert padded.vocab_size == plain.vocab_size + 2
    assert padded.token_bytes(plain.vocab_size) == b""


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(scored: dict[str, Any], score: float) -> None:
    scores = [*scored["tokenizer.ggml.scores"][:-1], score]
    assert _error(scored, "ggml.scores", scores).field == "tokenizer.ggml.scores"


def test_byte_tokens_that_are_none(scored: dict[str, Any]) -> None:
    """llama.cpp once wrote out of bounds for ``<0x-1>``."""
    for text in ("<0x-1>", "<0xZZ>", "0x41", "<0x041>"):
        tokens = list(scored["tokenizer.ggml.tokens"])
        tokens[scored["tokenizer.ggml.token_type"].index(6)] = text
        with pytest.raises(ModelFormatError) as caught:
            tokenizer_from_gguf({**scored, "tokenizer.ggml.tokens": tokens})
        assert caught.value.field == "tokenizer.ggml.token_type"


def test_bos_wanted_but_unknown(scored: dict[str, Any]) -> None:
    for flag, key in (("add_bos_token", "bos_token_id"), ("add_eos_token", "eos_token_id")):
        metadata = {k: v for k, v in scored.items() if k != f"tokenizer.ggml.{key}"}
        assert key in str(_error(metadata, f"ggml.{flag}", True))


def test_no_way_to_write_unknown_characters(scored: dict[str, Any]) -> None:
    metadata = {k: v for k, v in scored.items() if k != "tokenizer.ggml.unknown_token_id"}
    types = [1 if kind == 6 else kind for kind in scored["tokenizer.ggml.token_type"]]
    assert "256 byte tokens" in str(_error(metadata, "ggml.token_type", types))


def test_random_damage(byte_level: dict[str, Any], scored: dict[str, Any]) -> None:
    """Whatever is wrong, it loads or fails with one of our errors, and what loads can encode."""
    rng = random.Random(0)
    junk: list[Any] = [None, 0, -1, 2**63, 1.5, "", "x", [], [[]], ["a", 1], b"ab", {}, True, np.zeros(3), object()]
    loaded = failed = 0
    for _ in range(400):
        metadata = dict(rng.choice([byte_level, scored]))
        for _ in range(rng.randint(1, 2)):
            metadata[rng.choice(list(metadata))] = rng.choice(junk)
        try:
            tokenizer_from_gguf(metadata).encode("Hello <|im_end|> wörld 123")
            loaded += 1
        except (ModelFormatError, UnsupportedModelError):
            failed += 1
    assert loaded > 10
    assert failed > 100
