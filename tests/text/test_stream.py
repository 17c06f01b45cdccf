"""Incremental detokenisation: what a reader sees while tokens arrive must be what the whole output decodes to."""

from __future__ import annotations

import codecs
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.protocols import TextStream
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.tokenizer import Tokenizer

from . import tiny
from .corpus import corpus

BYTE_LEVEL = tokenizer_from_gguf(tiny.byte_level("qwen2")[1])
SCORED = tokenizer_from_gguf(tiny.scored(1, add_space_prefix=True)[1])
UNPREFIXED = tokenizer_from_gguf(tiny.scored(2, add_space_prefix=False)[1])
TOKENIZERS = [BYTE_LEVEL, SCORED, UNPREFIXED]


def _single_bytes(tokenizer: Tokenizer) -> list[int]:
    """Tokens of one byte: any sequence of them, valid UTF-8 or not, can come from a model."""
    return [n for n in range(min(tokenizer.vocab_size, 800)) if len(tokenizer.token_bytes(n)) == 1]


SINGLE_BYTES = [_single_bytes(tokenizer) for tokenizer in TOKENIZERS]


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Tokenizer, list[int]]:
    """A tokenizer and any tokens of it, often such that characters are cut."""
    index = draw(st.integers(0, len(TOKENIZERS) - 1))
    tokenizer = TOKENIZERS[index]
    token = st.one_of(
        st.integers(0, tokenizer.vocab_size + 2),
        st.sampled_from(SINGLE_BYTES[index]),
        st.sampled_from(sorted(tokenizer.special_token_ids)),
    )
    text = st.text().map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    by_bytes = st.text().map(lambda text: _as_bytes(index, text))
    parts = draw(st.lists(st.one_of(st.lists(token, max_size=8), text, by_bytes), max_size=6))
    return tokenizer, [token_id for part in parts for token_id in part]


def _as_bytes(index: int, text: str) -> list[int]:
    by_byte = {TOKENIZERS[index].token_bytes(n): n for n in SINGLE_BYTES[index]}
    return [by_byte[bytes([byte])] for byte in text.encode() if bytes([byte]) in by_byte]


@settings(max_examples=150, deadline=None)
@given(outputs(), st.booleans(), st.data())
def test_stream_equals_decode(output: tuple[Tokenizer, list[int]], skip: bool, data: st.DataObject) -> None:
    tokenizer, token_ids = output
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, rest = token_ids[:cut], token_ids[cut:]
    stream = tokenizer.text_stream(prompt, skip_special_tokens=skip)
    assert isinstance(stream, TextStream)
    seen = ""
    for token_id in rest:
        stream.advance([token_id])
        assert stream.text.startswith(seen)
        seen = stream.text
    stream.finish()
    assert stream.text.startswith(seen)
    # The text of the prompt, but for a character that it leaves incomplete, is not repeated.
    kept = codecs.getincrementaldecoder("utf-8")("replace").decode(_bytes(tokenizer, prompt, skip))
    whole = tokenizer.decode(token_ids, skip)
    assert whole == _bytes(tokenizer, token_ids, skip).decode("utf-8", "replace")
    assert stream.text == whole[len(kept) :]


def _bytes(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> bytes:
    skipped = tokenizer.special_token_ids if skip else ()
    data = b"".join(tokenizer.token_bytes(n) for n in token_ids if n not in skipped)
    return data.removeprefix(b" ") if tokenizer is SCORED else data


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40), st.sampled_from([0, 1, 2]), st.integers(0, 200))
def test_never_half_a_character(text: str, index: int, cut: int) -> None:
    """One byte a token, the prompt ending anywhere: only whole characters come out, and no U+FFFD is ever shown."""
    token_ids = _as_bytes(index, text)
    cut = min(cut, len(token_ids))
    stream = TOKENIZERS[index].text_stream(token_ids[:cut])
    whole = TOKENIZERS[index].decode(token_ids)
    for token_id in token_ids[cut:]:
        stream.advance([token_id])
        assert stream.text.count("\ufffd") <= whole.count("\ufffd")
        assert stream.text in whole
    stream.finish()
    assert whole.endswith(stream.text)


def test_emoji_over_several_tokens_appears_at_once() -> None:
    token_ids = _as_bytes(0, "a👩‍🚀")
    stream = BYTE_LEVEL.text_stream([])
    shown = []
    for token_id in token_ids:
        stream.advance([token_id])
        shown.append(stream.text)
    steps = [text for n, text in enumerate(shown) if n == 0 or text != shown[n - 1]]
    assert steps == ["a", "a👩", "a👩\u200d", "a👩\u200d🚀"]


def test_incomplete_character_is_released_at_the_end() -> None:
    stream = BYTE_LEVEL.text_stream([])
    stream.advance(_as_bytes(0, "ok😀")[:-1])
    assert stream.text == "ok"
    stream.finish()
    assert stream.text == "ok\ufffd"
    stream.finish()
    assert stream.text == "ok\ufffd"
    with pytest.raises(RuntimeError, match="finished"):
        stream.advance([1])


def test_leading_space_depends_on_the_prompt() -> None:
    """A tokenizer that puts a space before text takes one away, but only from the very beginning."""
    hello = SCORED.encode("hello", add_special_tokens=False)
    for prompt, expected in (([], "hello"), ([1], "hello"), (SCORED.encode("x"), " hello")):
        stream = SCORED.text_stream(prompt)
        stream.advance(hello)
        assert stream.text == expected
        assert SCORED.decode(prompt) + stream.text == SCORED.decode(prompt + hello)
    shown = SCORED.text_stream([1], skip_special_tokens=False)
    shown.advance(hello)
    assert shown.text == " hello"


def test_special_tokens_shown_or_skipped() -> None:
    end = BYTE_LEVEL.eos_token_ids[-1]
    token_ids = [*BYTE_LEVEL.encode("a"), end, *BYTE_LEVEL.encode("b"), end, end]
    for skip, expected in ((True, "ab"), (False, "a<|im_end|>b<|im_end|><|im_end|>")):
        for between in (True, False):
            stream = BYTE_LEVEL.text_stream([], skip_special_tokens=skip, spaces_between_special_tokens=between)
            stream.advance(token_ids)
            assert stream.text == expected
    assert tiny.byte_level("qwen2")[0].decode(token_ids) == "a<|im_end|>b<|im_end|><|im_end|>"


def _snapshot(stream: Any) -> tuple:
    probe = stream.fork()
    probe.advance(_as_bytes(0, "é STOP x"))
    after = probe.text, probe.stop_reason
    probe.finish()
    return stream.text, stream.stop_reason, after, probe.text


@settings(max_examples=100, deadline=None)
@given(outputs(), st.lists(st.sampled_from(["a", "ab", "STOP", "é", " ", "\n\n", "aba"]), max_size=3), st.data())
def test_fork_and_rollback_are_exact(output: tuple[Tokenizer, list[int]], stop: list[str], data: st.DataObject) -> None:
    """Any walk of advance, rollback, fork and finish leaves the state that the tokens alone give."""
    tokenizer, pool = output
    if not pool:
        return
    streams = [(tokenizer.text_stream(pool[:3], stop=stop), [])]
    for _ in range(data.draw(st.integers(1, 12))):
        stream, taken = data.draw(st.sampled_from(streams))
        action = data.draw(st.sampled_from(["advance", "advance", "rollback", "fork", "finish"]))
        if action == "advance" and not stream.finished:
            new = data.draw(st.lists(st.sampled_from(pool), max_size=6))
            stream.advance(new)
            taken += new
        elif action == "rollback":
            count = data.draw(st.integers(0, len(taken)))
            stream.rollback(count)
            del taken[len(taken) - count :]
        elif action == "fork":
            streams.append((stream.fork(), list(taken)))
        elif action == "finish":
            stream.finish()
            stream.rollback(0)
        for other, tokens in streams:
            fresh = tokenizer.text_stream(pool[:3], stop=stop)
            fresh.advance(tokens)
            assert (other.text, other.stop_reason) == (fresh.text, fresh.stop_reason)
    if tokenizer is BYTE_LEVEL:
        for other, tokens in streams:
            fresh = tokenizer.text_stream(pool[:3], stop=stop)
            fresh.advance(tokens)
            assert _snapshot(other) == _snapshot(fresh)


@settings(max_examples=100, deadline=None)
@given(outputs(), st.lists(st.sampled_from(["a", "ab", "STOP", "é", " ", "\n\n"]), max_size=2), st.data())
def test_what_is_new_adds_up(output: tuple[Tokenizer, list[int]], stop: list[str], data: st.DataObject) -> None:
    """Asked for in pieces, with whole texts, forks and rollbacks between, the text is what it is as a whole."""
    tokenizer, token_ids = output
    stream = tokenizer.text_stream(token_ids[:1], stop=stop)
    told = ""
    for token_id in token_ids:
        stream.advance([token_id])
        if data.draw(st.booleans()):
            stream.advance([token_id])
            stream.rollback(1)
        match data.draw(st.integers(0, 3)):
            case 0:
                stream = stream.fork()
            case 1:
                told += stream.text_after(len(told))
                assert told == stream.text
            case 2:
                told += stream.text_after(len(told))
        start = data.draw(st.integers(0, 12))
        assert stream.text_after(start) == stream.text[start:]
    stream.finish()
    assert told + stream.text_after(len(told)) == stream.text


def test_rollback_past_the_beginning() -> None:
    stream = BYTE_LEVEL.text_stream([5, 6])
    stream.advance([7])
    for count in (2, 1000, -1):
        with pytest.raises(ValueError, match="cannot roll back"):
            stream.rollback(count)
    stream.rollback(1)
    assert stream.text == ""


def test_forks_do_not_see_each_other() -> None:
    trunk = BYTE_LEVEL.text_stream([])
    trunk.advance(_as_bytes(0, "trunk 😀")[:-2])
    one, other = trunk.fork(), trunk.fork()
    one.advance(_as_bytes(0, "trunk 😀")[-2:])
    other.advance(BYTE_LEVEL.encode("x"))
    assert (trunk.text, one.text, other.text) == ("trunk ", "trunk 😀", "trunk \ufffdx")


def test_ten_thousand_tokens_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the text after every token must not decode it all again."""
    words = BYTE_LEVEL.encode(" ".join(corpus()))
    token_ids = (words * (10_000 // len(words) + 1))[:10_000]

    decoded = 0

    def counting(data: bytes, errors: str, final: bool) -> tuple[str, int]:
        nonlocal decoded
        decoded += len(data)
        return codecs.utf_8_decode(data, errors, final)

    monkeypatch.setattr("octavo.text.stream.codecs", SimpleNamespace(utf_8_decode=counting))
    stream = BYTE_LEVEL.text_stream([], stop=["never to be found", "nor this"])
    for token_id in token_ids:
        stream.advance([token_id])
        _ = stream.text
    assert len(stream.text.encode()) <= decoded < 2 * len(stream.text.encode()), "a byte twice where a character is cut"


def test_long_history_is_freed_without_recursion() -> None:
    """A state points to the one before it; freeing a long chain must not overflow the stack."""
    stream = BYTE_LEVEL.text_stream([])
    stream.advance(BYTE_LEVEL.encode("a") * 300_000)
    copy = stream.fork()
    del stream
    copy.rollback(299_999)
    assert copy.text == "a"
