"""The strict reader of JSON: what it takes it reads as `json` does, and what it refuses is an ApiError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.errors import ApiError
from octavo.server.json_body import BodyBuffer, parse_json
from octavo.server.settings import Limits

LIMITS = Limits(max_json_depth=8, max_json_values=50)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_what_is_json_is_read(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    if depth_of(value) > LIMITS.max_json_depth:
        with pytest.raises(ApiError, match="deep"):
            parse_json(body, LIMITS)
    else:
        assert parse_json(body, LIMITS) == value


@settings(deadline=None, max_examples=300)
@given(st.binary() | st.text('{}[]",:\\ud8f0123456789.eE+- \nNaInfty').map(lambda text: text.encode()))
def test_what_is_none_is_refused(body: bytes) -> None:
    try:
        value = parse_json(body, LIMITS)
    except ApiError as error:
        assert error.status == 400 and error.message.isprintable()
    else:
        assert json.loads(body) == value


@pytest.mark.parametrize("depth", [7, 8, 9, 10, 100, 100000])
@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")])
def test_depth(depth: int, pair: tuple[str, str]) -> None:
    inner = "1" if pair[0] != "[" else ""
    body = (pair[0] * depth + inner + pair[1] * depth).encode()
    if depth <= 8:
        assert depth_of(parse_json(body, LIMITS)) == depth
    else:
        with pytest.raises(ApiError, match="nested more than 8 deep"):
            parse_json(body, LIMITS)


def test_the_number_of_values() -> None:
    """Commas in strings are none, also behind an escaped quote."""
    assert len(parse_json(b"[" + b"1," * 50 + b"1]", LIMITS)) == 51
    with pytest.raises(ApiError, match="more than 50 values"):
        parse_json(b"[" + b"1," * 51 + b"1]", LIMITS)
    assert parse_json(b'["' + b"," * 100 + b'", "\\"' + b"," * 100 + b'"]', LIMITS)[1] == '"' + "," * 100


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"\\uDFFF x"', '{"\\ud800": 1}', '[["\\udc00\\ud800"]]', '"\\ud83d\\ud83d\\ude00"']
)
def test_half_of_a_surrogate_pair(text: str) -> None:
    with pytest.raises(ApiError, match="surrogate"):
        parse_json(text.encode(), LIMITS)
    assert parse_json(b'"\\ud83d\\ude00 \\\\ud800"', LIMITS) == "\U0001f600 \\ud800"


def test_room_for_bodies() -> None:
    """Of all together; one alone has what it needs, and all of it comes back."""
    buffer = BodyBuffer(100)
    with buffer.room() as first:
        first.take(150)
        with buffer.room() as second, pytest.raises(ApiError) as refused:
            second.take(1)
        assert refused.value.status == 429
    assert buffer.held == 0
    with buffer.room() as first, buffer.room() as second:
        first.take(50)
        second.take(50)
        with pytest.raises(ApiError):
            first.take(1)
    assert buffer.held == 0
