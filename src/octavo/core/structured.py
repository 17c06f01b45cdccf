"""Structured outputs: what an output must look like, validated where it enters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.values import (
    check_unicode,
    exact_bool,
    exact_fields,
    exact_json,
    exact_list,
    exact_record,
    exact_str,
    is_a,
)

MAX_GRAMMAR = 1 << 20  # characters of a schema, an expression or a grammar
MAX_DEPTH = 64  # of a schema
MAX_CHOICES = 1 << 12
# How the error begins of a grammar that could not be compiled for those of others: its request is a good one.
TOO_MANY = "too many grammars are being compiled"
_KINDS = "json", "regex", "choice", "grammar", "json_object"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must look like; exactly one of the first five. Names are vLLM's.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it. Whether a schema, expression
    or grammar is a good one is checked with the model at hand, before the request runs.

    Attributes:
        json: a JSON schema, as a mapping or as text.
        regex: a regular expression that the whole output matches, without look-around and back references.
        choice: texts, one of which the output is.
        grammar: a context-free grammar in the Lark form of llguidance, or in the GBNF form of llama.cpp.
        json_object: any JSON object.
        disable_any_whitespace: with `json` and `json_object`: no spaces but inside strings.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            allowed = ", ".join(_KINDS)
            told = ", ".join(given) or "none"
            raise InvalidRequestError("structured_outputs", f"exactly one of {allowed} must be given, not {told}")
        if self.json is not None:
            _set(self, "json", _schema(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None:
                _set(self, name, _text(f"structured_outputs.{name}", value))
        if self.choice is not None:
            _set(self, "choice", _choices(self.choice))
        if self.json_object is not None:
            _set(self, "json_object", exact_bool("structured_outputs.json_object", self.json_object))
        field = "structured_outputs.disable_any_whitespace"
        _set(self, "disable_any_whitespace", exact_bool(field, self.disable_any_whitespace))
        if self.disable_any_whitespace and given[0] not in ("json", "json_object"):
            raise InvalidRequestError(field, f"has no effect with {given[0]}")

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # frozen: normalised once, in __post_init__


def _text(field: str, value: object) -> str:
    text = exact_str(field, value)
    if not text:
        raise InvalidRequestError(field, "is empty")
    if len(text) > MAX_GRAMMAR:
        raise InvalidRequestError(field, f"may have at most {MAX_GRAMMAR} characters, not {len(text)}")
    check_unicode(field, text)
    return text


def _schema(value: object) -> str:
    """As text, so that a value it is."""
    field = "structured_outputs.json"
    if is_a(value, str):
        text = _text(field, value)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(field, f"is not JSON: {error}") from None
    if not is_a(value, (Mapping, bool)):
        raise InvalidRequestError(field, f"must be a JSON schema, which is an object, not {shown(value)}")
    return _text(field, json.dumps(exact_json(field, value, MAX_DEPTH), ensure_ascii=False))


def _choices(value: object) -> tuple[str, ...]:
    field = "structured_outputs.choice"
    listed = exact_list(field, value, "must be a list of strings")
    if not 1 <= len(listed) <= MAX_CHOICES:
        raise InvalidRequestError(field, f"must have from 1 to {MAX_CHOICES} texts, not {len(listed)}")
    texts = tuple(_text(f"{field}[{number}]", one) for number, one in enumerate(listed))
    if sum(map(len, texts)) > MAX_GRAMMAR:
        raise InvalidRequestError(field, f"may have at most {MAX_GRAMMAR} characters together")
    return texts


def structured_outputs(value: object) -> StructuredOutputsParams | None:
    """Of SamplingParams. Raises InvalidRequestError."""
    if value is None or is_a(value, StructuredOutputsParams):
        return None if value is None else exact_record("structured_outputs", value, StructuredOutputsParams)
    given = exact_fields("structured_outputs", value, "must be StructuredOutputsParams or a mapping")
    allowed = [one.name for one in fields(StructuredOutputsParams)]
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(
                "structured_outputs", f"{shown(name)} is not a field; allowed are {', '.join(allowed)}"
            )
    return StructuredOutputsParams(**given)
