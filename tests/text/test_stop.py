"""Stop strings: found wherever tokens cut them, never shown, nothing else withheld for long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.stream import StopMatcher

from . import tiny

TOKENIZER = tokenizer_from_gguf(tiny.byte_level("gpt-2")[1])
BYTES = {TOKENIZER.token_bytes(n): n for n in range(400) if len(TOKENIZER.token_bytes(n)) == 1}


def by_bytes(text: str) -> list[int]:
    return [BYTES[bytes([byte])] for byte in text.encode()]


def expected(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the string completed first; of those completed together the longest."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            string = max(found, key=len)
            return (text[:end] if include else text[: end - len(string)]), string
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.text(alphabet="abé😀\n", max_size=40),
    st.lists(st.text(alphabet="abé😀\n", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_against_the_definition(text: str, stop: list[str], include: bool, data: st.DataObject) -> None:
    """However the text is cut into tokens the outcome is the same, and no part of a stop string is ever shown."""
    token_ids = TOKENIZER.encode(text) if data.draw(st.booleans()) else by_bytes(text)
    final, reason = expected(text, stop, include)
    stream = TOKENIZER.text_stream([], stop=stop, include_stop_str_in_output=include)
    taken = 0
    while taken < len(token_ids):
        count = data.draw(st.integers(1, 5))
        stream.advance(token_ids[taken : taken + count])
        taken += count
        if stream.stop_reason is None:
            complete = b"".join(map(TOKENIZER.token_bytes, token_ids[:taken])).decode(errors="ignore")
            beginnings = [string[:n] for string in stop for n in range(len(string)) if complete.endswith(string[:n])]
            assert stream.text == complete[: len(complete) - max(map(len, beginnings))]
        else:
            assert stream.text == final
    stream.finish()
    assert (stream.text, stream.stop_reason) == (final, reason)


def test_held_back_text_is_released_once_it_is_no_stop_string() -> None:
    stream = TOKENIZER.text_stream([], stop=["</answer>"])
    stream.advance(by_bytes("1 </ans"))
    assert stream.text == "1 "
    stream.advance(by_bytes("!"))
    assert stream.text == "1 </ans!"
    stream.advance(by_bytes(" </answer"))
    assert stream.text == "1 </ans! "
    stream.finish()
    assert stream.text == "1 </ans! </answer"
    assert stream.stop_reason is None


def test_after_the_stop_string_everything_is_ignored() -> None:
    for include, text in ((False, "a"), (True, "aSTOP")):
        stream = TOKENIZER.text_stream([], stop=["STOP"], include_stop_str_in_output=include)
        stream.advance(TOKENIZER.encode("aSTOPb"))
        stream.advance(TOKENIZER.encode("more STOP"))
        assert (stream.text, stream.stop_reason) == (text, "STOP")
        stream.finish()
        assert (stream.text, stream.stop_reason) == (text, "STOP")


def test_rollback_past_a_stop_string_takes_it_back() -> None:
    stream = TOKENIZER.text_stream([], stop=["END"])
    stream.advance(by_bytes("xEND"))
    stream.advance(by_bytes("yy"))  # ignored, but they count
    assert stream.stop_reason == "END"
    stream.rollback(3)
    assert (stream.text, stream.stop_reason) == ("x", None)
    stream.advance(by_bytes("?"))
    assert stream.text == "xEN?"


@pytest.mark.parametrize(
    ("stop", "text", "final", "reason"),
    [
        (["abcd", "bc"], "abcd", "a", "bc"),  # completed first
        (["s>", "</s>"], "x</s>", "x", "</s>"),  # completed together: the longest
        (["aab"], "aaab", "a", "aab"),  # the beginning of a match overlaps one that failed
        (["ab", "ab"], "ab", "", "ab"),
        (["é"], "e\u0301é", "e\u0301", "é"),  # by code point, without normalisation
    ],
)
def test_which_stop_string(stop: list[str], text: str, final: str, reason: str) -> None:
    stream = TOKENIZER.text_stream([], stop=stop)
    stream.advance(TOKENIZER.encode(text))
    assert (stream.text, stream.stop_reason) == (final, reason)


def test_only_the_output_is_searched() -> None:
    stream = TOKENIZER.text_stream(TOKENIZER.encode("STOP ST"), stop=["STOP"])
    stream.advance(TOKENIZER.encode("OP"))
    assert stream.stop_reason is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_special_tokens_can_be_stop_strings(skip: bool, include: bool) -> None:
    start, end = TOKENIZER.encode("<|im_start|>") + TOKENIZER.encode("<|im_end|>")
    stop = {"stop": ["<|im_end|>"], "skip_special_tokens": skip, "include_stop_str_in_output": include}
    stream = TOKENIZER.text_stream([], **stop)
    stream.advance([*by_bytes("a"), start, *by_bytes("b"), end, *by_bytes("c")])
    shown = "ab" if skip else "a<|im_start|>b"
    assert (stream.text, stream.stop_reason) == (shown + ("<|im_end|>" if include else ""), "<|im_end|>")
    early = TOKENIZER.text_stream([], **stop, stop_after=2)
    early.advance([*by_bytes("a"), end, *by_bytes("b")])
    assert (early.text, early.stop_reason) == ("ab" if skip else "a<|im_end|>b", None)
    early.advance([end])
    assert early.stop_reason == "<|im_end|>"
    early.rollback(1)
    assert early.stop_reason is None


def test_matcher_is_linear_in_hostile_patterns() -> None:
    """Partial matches that fail late must not be tried again from every position."""
    matcher = StopMatcher(["a" * 5000 + "b", "a" * 4999 + "c"])
    node, found, read = matcher.feed(0, "a" * 200_000)
    assert (found, read, matcher.depth(node)) == (None, 200_000, 5000)
    assert matcher.feed(node, "b")[1] == "a" * 5000 + "b"
