"""Bodies of requests: received within bounds, and read as JSON strictly.

JSON as RFC 8259 has it, so no NaN, no key twice in an object, no half of a surrogate pair, and no number that a float
cannot hold.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from octavo.core.errors import shown
from octavo.server.errors import ApiError
from octavo.server.settings import Limits

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Of one that does not end, all that follows, so that no character is looked at twice.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
_LONG = 1 << 18  # bytes, from which on reading takes long enough for others to notice


class ClientGoneError(Exception):
    """The client has left: nobody waits for an answer."""


class BodyBuffer:
    """How many bytes of bodies are held, of all requests that are being received, or worked on before their answer
    begins: what was read of them lives on until then. Of one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def room(self) -> Iterator[BodyRoom]:
        """For one request's body, until the block ends."""
        room = BodyRoom(self)
        try:
            yield room
        finally:
            self.held -= room.taken


class BodyRoom:
    """What one request's body takes of it."""

    def __init__(self, buffer: BodyBuffer) -> None:
        self._buffer = buffer
        self.taken = 0

    def take(self, count: int) -> None:
        """Raises ApiError (429) if there is no room; a body that is the only one has as much as it may be long."""
        if self._buffer.held + count > self._buffer.most and self._buffer.held > self.taken:
            raise ApiError(429, "too many bodies are being received: try it again", headers={"Retry-After": "1"})
        self._buffer.held += count
        self.taken += count


async def read_json(request: Request, room: BodyRoom, limits: Limits, timeout: float) -> dict[str, Any]:
    """The body, which must be an object. Raises ApiError (400, 408, 413, 415, 429), ClientGoneError."""
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(timeout):
            body = await _receive(request, room, limits.max_body_bytes)
    except TimeoutError:
        problem = f"the body did not arrive within {timeout:g} s"
        raise ApiError(408, problem, headers={"Connection": "close"}) from None
    value = await asyncio.to_thread(parse_json, body, limits) if len(body) > _LONG else parse_json(body, limits)
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(value)}")
    return value


def _check_headers(request: Request, limits: Limits) -> None:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        found = f", not {shown(kind.strip())}" if kind.strip() else ""
        raise ApiError(415, f"the content type must be application/json{found}", "Content-Type")
    charset = parameters.strip().lower().replace('"', "")
    if charset and charset not in ("charset=utf-8", "charset=utf8"):
        raise ApiError(415, "JSON must be sent as UTF-8", "Content-Type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise ApiError(415, f"bodies must not be compressed: {shown(encoding)} is not supported", "Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > limits.max_body_bytes):
        raise _too_large(limits.max_body_bytes)


def _too_large(most: int) -> ApiError:
    # The rest of the body is not read, so nothing else can come on this connection.
    return ApiError(413, f"a body may have at most {most} bytes", None, {"Connection": "close"})


async def _receive(request: Request, room: BodyRoom, most: int) -> bytes:
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        if room.taken + len(part) > most:
            raise _too_large(most)
        room.take(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_json(body: bytes, limits: Limits) -> Any:
    """Raises ApiError (400)."""
    if body.count(b",") > limits.max_json_values:  # else there cannot be so many values
        commas = _STRINGS.sub(b"", body).count(b",")
        if commas > limits.max_json_values:
            raise ApiError(400, f"the body has more than {limits.max_json_values} values")
    nested = body.count(b"[") + body.count(b"{") > limits.max_json_depth
    try:
        text = body.decode("utf-8")
        value = _decoder.decode(text)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _too_deep(limits) from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # ours, and of integers with very many digits
        raise ApiError(400, f"the body is not JSON: {shown(str(error))[1:-1]}") from None
    if nested:
        _check_depth(value, limits)
    if _ESCAPED_SURROGATE.search(body):
        _check_surrogates(value)
    return value


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands twice in an object")
            seen.add(key)
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_refuse_constant)


def _too_deep(limits: Limits) -> ApiError:
    return ApiError(400, f"the body is nested more than {limits.max_json_depth} deep")


def _check_depth(value: Any, limits: Limits) -> None:
    level = [value]
    for _ in range(limits.max_json_depth):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                items = one.values() if isinstance(one, dict) else one
                inner += [item for item in items if isinstance(item, dict | list)]
        if not inner:
            return
        level = inner
    raise _too_deep(limits)


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                code = ord(one[error.start])
                raise ApiError(400, f"the body is not JSON: a string holds the lone surrogate U+{code:04X}") from None
        elif isinstance(one, dict):
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
