"""Values of the engine's contract as msgpack: what goes between the server's two processes. No pickle, no code: of
classes only those listed here are made, and of these only their fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import msgspec

from octavo.core import margins, pooling, session_calls
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import (
    ConfigError,
    DownloadError,
    EngineClosedError,
    InvalidRequestError,
    ModelFormatError,
    ModelNotFoundError,
    OctavoError,
    OutOfMemoryError,
    RequestFailedError,
    UnsupportedModelError,
)
from octavo.core.outputs import (
    CacheExplanation,
    CacheStats,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from octavo.core.params import LogitBias, OutputKind, RepetitionDetectionParams, SamplingParams
from octavo.core.proposer import SpeculationStats
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.structured import StructuredOutputsParams
from octavo.frontend import Limits

# In this order they are numbered: both processes are of one installation.
_RECORDS: tuple[type, ...] = (
    RequestOutput,
    CompletionOutput,
    RequestMetrics,
    Logprob,
    RequestSpec,
    SamplingParams,
    RepetitionDetectionParams,
    StructuredOutputsParams,
    BeamSearchParams,
    SessionSpec,
    session_calls.Call,
    session_calls.Extend,
    session_calls.Truncate,
    session_calls.Fork,
    session_calls.Generate,
    session_calls.Generated,
    session_calls.Select,
    session_calls.Drop,
    margins.MarginsSpec,
    margins.Segment,
    margins.Question,
    margins.MarginsOutput,
    margins.Margin,
    margins.SegmentRead,
    margins.MarginWritten,
    margins.MarginDecided,
    margins.ReviewBegun,
    margins.AnswerBegun,
    margins.AnswerDelta,
    margins.Judge,
    margins.AnswerNow,
    margins.StopReading,
    CacheExplanation,
    CacheStats,
    SpeculationStats,
    Limits,
    pooling.PoolingSpec,
    pooling.PoolingParams,
    pooling.PoolingOutput,
)
_ERRORS: tuple[type[OctavoError], ...] = (
    ConfigError,
    DownloadError,
    EngineClosedError,
    InvalidRequestError,
    ModelFormatError,
    ModelNotFoundError,
    OutOfMemoryError,
    RequestFailedError,
    UnsupportedModelError,
)
_LIST, _TUPLE, _DICT, _SET, _KIND, _BIAS, _ERROR = range(7)
_FIRST = 16  # number of the first record
_PLAIN = frozenset([type(None), bool, int, float, str, bytes])
_NUMBERS = {kind: number for number, kind in enumerate(_RECORDS, _FIRST)}


def _names(kind: Any) -> tuple[str, ...]:
    named: tuple[str, ...] | None = getattr(kind, "_fields", None)
    return tuple(one.name for one in fields(kind)) if named is None else named


_FIELDS = {kind: _names(kind) for kind in _RECORDS}
_encode, _decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode


def dumps(value: Any) -> bytes:
    """Raises TypeError for what is no value of the contract."""
    return _encode(_packed(value))


def loads(data: bytes | bytearray | memoryview) -> Any:
    """Raises ValueError for what `dumps` has not made."""
    try:
        return _unpacked(_decode(data))
    except (msgspec.DecodeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a message of this version: {error}") from None


def _packed(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    number = _NUMBERS.get(kind)
    if number is not None:
        return [number, *[_packed(getattr(value, name)) for name in _FIELDS[kind]]]
    if kind is list or kind is tuple:
        return [_LIST if kind is list else _TUPLE, *_items(value)]
    if kind is dict:
        return [_DICT, *[_packed(part) for item in value.items() for part in item]]
    if kind is frozenset:
        return [_SET, *_items(sorted(value))]
    if kind is OutputKind:
        return [_KIND, value.value]
    if kind is LogitBias:
        return [_BIAS, *[part for item in value.items() for part in item]]
    if isinstance(value, Exception):
        return [_ERROR, *_error(value)]
    raise TypeError(f"{kind.__name__} is no value between processes")


def _items(values: Sequence[Any]) -> Sequence[Any]:
    """Token ids, of which there may be thousands, are looked at as a whole."""
    return values if set(map(type, values)) <= {int} else [_packed(one) for one in values]


def _error(error: Exception) -> tuple[Any, ...]:
    if isinstance(error, InvalidRequestError):
        return "InvalidRequestError", error.field, error.problem
    if isinstance(error, ModelFormatError):
        return "ModelFormatError", error.path, error.field, error.problem
    name = type(error).__name__
    if type(error) in _ERRORS:
        return name, str(error)
    return "RequestFailedError", f"{name}: {error}"


def _unpacked(value: Any) -> Any:
    if type(value) is not list:
        return value
    number = value[0]
    if number >= _FIRST:
        return _made(_RECORDS[number - _FIRST], value)
    if number == _LIST:
        return [_unpacked(one) for one in value[1:]] if _is_nested(value) else value[1:]
    if number == _TUPLE:
        return tuple([_unpacked(one) for one in value[1:]] if _is_nested(value) else value[1:])
    if number == _DICT:
        parts = [_unpacked(one) for one in value[1:]]
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if number == _SET:
        return frozenset(map(_unpacked, value[1:]))
    if number == _KIND:
        return OutputKind(value[1])
    if number == _BIAS:
        return LogitBias(zip(value[1::2], value[2::2], strict=True))
    if number == _ERROR:
        makers: dict[str, Callable[..., Exception]] = {kind.__name__: kind for kind in _ERRORS}
        return makers[value[1]](*value[2:])
    raise ValueError(f"kind {number}")


def _is_nested(value: list[Any]) -> bool:
    return list in set(map(type, value))


def _made(kind: Any, value: list[Any]) -> Any:
    """Fields were checked where the value came from: they are put in as they are."""
    names, parts = _FIELDS[kind], [_unpacked(one) for one in value[1:]]
    if len(parts) != len(names):
        raise ValueError(f"{kind.__name__} of {len(parts)} fields")
    if hasattr(kind, "_make"):
        return kind._make(parts)
    made = kind.__new__(kind)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(made, name, part)
    return made
