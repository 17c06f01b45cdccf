"""From fields of a request to the parameters of the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.params import OutputKind, SamplingParams
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError, instead, invalid, unknown_field
from octavo.server.fields import DrawParams, SamplingFields, sampling_fields
from octavo.server.settings import Limits

_BEAM_FIELDS = frozenset(one.name for one in fields(BeamSearchParams) if one.init)
_SCHEMA_KEYS = frozenset(["name", "schema", "strict", "description"])
_OF_SEARCHES = {"n"}  # fields of sampling that a search takes under another name

Params = SamplingParams | BeamSearchParams


def params_of(body: SamplingFields, context: ServerContext, more: dict[str, Any]) -> Params:
    """What a request asks for. `more`: fields of SamplingParams that its route makes of others. Raises ApiError,
    InvalidRequestError naming the field at fault."""
    given = sampling_fields(body)
    structured, name = _structured(body)
    if structured is not None:
        given["structured_outputs"] = structured
    given |= more
    streamed = bool(body.stream)
    if body.stream_options is not None and not streamed:
        raise invalid("stream_options", "has no effect without stream")
    with renamed({"structured_outputs": name}):
        if body.use_beam_search:
            return _beams(given, body, context.settings.limits)
        if body.length_penalty not in (None, 1, 1.0):
            raise invalid("length_penalty", "has no effect without use_beam_search")
        if streamed and given.get("prompt_logprobs") is not None:
            raise invalid("prompt_logprobs", "is not for streams")
        params = drawn(given, context, streamed=streamed)
    if params.n > context.settings.limits.max_n:
        raise invalid("n", f"must be at most {context.settings.limits.max_n}, not {params.n}")
    return params


def drawn(given: dict[str, Any], context: ServerContext, *, streamed: bool) -> SamplingParams:
    """Of fields of SamplingParams; where a request says nothing it is as the model's files recommend. Raises
    InvalidRequestError."""
    check_lengths(given, context.settings.limits)
    kind = OutputKind.DELTA if streamed else OutputKind.FINAL_ONLY
    return SamplingParams(**{**context.defaults, **given}, output_kind=kind)


def turn_params(body: DrawParams, context: ServerContext) -> SamplingParams:
    """Of a session's branch. Raises InvalidRequestError."""
    return drawn(sampling_fields(body), context, streamed=False)


def _beams(given: dict[str, Any], body: SamplingFields, limits: Limits) -> BeamSearchParams:
    if body.stream:
        raise invalid("stream", "is not for beam search, whose outputs are known at its end")
    for name in [name for name, value in given.items() if value is not None]:
        if name not in _BEAM_FIELDS and name not in _OF_SEARCHES:
            raise invalid(name, "has no effect with use_beam_search")
    check_lengths(given, limits)
    width = given.pop("n", 1)
    penalty = {} if body.length_penalty is None else {"length_penalty": body.length_penalty}
    with renamed({"beam_width": "n"}):
        params = BeamSearchParams(**given, **penalty, beam_width=width, output_kind=OutputKind.FINAL_ONLY)
    if params.width > limits.max_n:
        raise invalid("n", f"must be at most {limits.max_n}, not {params.width}")
    return params


def beam_params(given: dict[str, Any], limits: Limits) -> BeamSearchParams:
    """Of a request that has the library's names. Raises InvalidRequestError, ApiError."""
    check_lengths(given, limits)
    params = BeamSearchParams(**given, output_kind=OutputKind.FINAL_ONLY)
    if params.width > limits.max_n:
        raise invalid("beam_width", f"must be at most {limits.max_n}, not {params.width}")
    return params


def changed(name: str, given: object, default: SamplingParams | None, limits: Limits) -> SamplingParams:
    """Parameters of one text, such as a margin: those of `default` but for what is given. Raises ApiError."""
    default = SamplingParams() if default is None else default
    allowed = {one.name for one in fields(SamplingParams)} - {"output_kind", "n", "detokenize"}
    if not isinstance(given, dict):
        raise invalid(name, f"must be an object, not {shown(given)}")
    for field in given:
        if field not in allowed:
            path = f"{name}.{field}" if field.isidentifier() and len(field) <= 40 else name
            raise invalid(path, f"is not known here; {instead(field, allowed)}")
    with inside(name):
        check_lengths(given, limits)
        return default.but(**{field: value for field, value in given.items() if value is not None})


def check_lengths(given: Mapping[str, Any], limits: Limits) -> None:
    """Of lists, whose items are checked later. Raises InvalidRequestError."""
    for name, most in (
        ("stop", limits.max_stop_strings),
        ("bad_words", limits.max_bad_words),
        ("logit_bias", limits.max_logit_bias),
    ):
        value = given.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise InvalidRequestError(name, f"may have at most {most} entries, not {len(value)}")


def written_as(body: SamplingFields) -> str:
    """What a request calls its structured outputs."""
    return _structured(body)[1]


def _structured(body: SamplingFields) -> tuple[Any, str]:
    """`structured_outputs`, and what the request calls it."""
    field = "response_format"
    return either_form(field, *form_of(field, body.response_format), body.structured_outputs)


def either_form(field: str, form: Any, name: str, structured_outputs: Any) -> tuple[Any, str]:
    """The form of an answer that a request gives by a field of its route, as structured outputs, or by
    `structured_outputs`; and what it calls it: `name`, of the first. Raises ApiError where both are given."""
    if form is None:
        return structured_outputs, "structured_outputs"
    if structured_outputs is not None:
        raise invalid(field, "cannot be given beside structured_outputs")
    return form, name


def form_of(name: str, given: object, nested: str = "json_schema") -> tuple[dict[str, Any] | None, str]:
    """The form of an answer in OpenAI's words, as fields of structured outputs, None for text; and what the request
    calls it. What belongs to a schema lies under the key `nested`, or beside the type where that is empty. Raises
    ApiError."""
    if given is None:
        return None, name
    if not isinstance(given, dict):
        raise invalid(name, f"must be an object with a type, not {shown(given)}")
    kind, allowed = given.get("type"), {"type"}
    if kind == "json_schema":
        allowed |= {nested} if nested else _SCHEMA_KEYS
    if unknown := given.keys() - allowed:
        raise unknown_field(name, unknown, allowed)
    if kind == "text":
        return None, name
    if kind == "json_object":
        return {"json_object": True}, name
    if kind != "json_schema":
        raise invalid(f"{name}.type", f"must be text, json_object or json_schema, not {shown(kind)}")
    if not nested:
        return {"json": _schema(name, given)}, f"{name}.schema"
    name = f"{name}.{nested}"
    return {"json": _schema(name, given.get(nested))}, name


def _schema(name: str, given: object) -> Any:
    if not isinstance(given, dict):
        raise invalid(name, 'must be {"name": ..., "schema": ...}')
    if unknown := given.keys() - _SCHEMA_KEYS - {"type"}:
        raise unknown_field(name, unknown, _SCHEMA_KEYS)
    for part, kind in (("name", str), ("description", str), ("strict", bool)):
        if given.get(part) is not None and not isinstance(given[part], kind):
            raise invalid(f"{name}.{part}", f"must be {'a string' if kind is str else 'true or false'}")
    schema = given.get("schema")
    return {} if schema is None else schema


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """The library's names of fields become those that the request has for them."""
    try:
        yield
    except InvalidRequestError as error:
        for name, other in names.items():
            rest = error.field.removeprefix(name)
            if name != other and rest != error.field and rest[:1] in ("", ".", "["):
                raise InvalidRequestError(other, error.problem) from None
        raise


@contextmanager
def inside(name: str) -> Iterator[None]:
    """What is at fault is a field of the field `name`."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}.{error.field}", error.problem) from None
    except ApiError as error:
        if error.param is None:
            raise
        raise ApiError(error.status, f"{name}.{error.message}", f"{name}.{error.param}") from None
