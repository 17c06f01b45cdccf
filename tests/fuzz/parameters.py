"""Random values of every type in every field of what a request asks: taken as they are, or refused by their field."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from typing import Any
from unittest.mock import patch

from octavo.config import EngineConfig
from octavo.core import values as exact
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import ConfigError, InvalidRequestError
from octavo.core.params import LogitBias, OutputKind, RepetitionDetectionParams, SamplingParams
from tests import hostile

_KINDS: list[type] = [SamplingParams, BeamSearchParams, EngineConfig]
_FIELDS = {kind.__name__: [field.name for field in fields(kind) if field.init] for kind in _KINDS}


def value(rng: random.Random, depth: int = 3) -> Any:
    choice = rng.randrange(10 if depth else 6)
    if choice == 0:
        return rng.choice([0, 1, -1, 2, 16, 2**31, 2**53, 2**64, -(2**63), 10**40])
    if choice == 1:
        return rng.choice([0.0, 1.0, -0.5, 1e-9, 1e308, float("inf"), float("nan"), 0.3])
    if choice == 2:
        return rng.choice(["", "a", "never", "delta", "auto", "cpu", "\0", "ä" * 5000, "1", "9" * 30])
    if choice in (3, 4):
        return rng.choice([None, True, False])
    if choice == 5:
        return rng.randint(-5, 40)
    if choice == 9:
        return {"as": rng.choice(DRESSES), "value": value(rng, depth - 1)}
    if choice == 6:
        return {str(value(rng, 0))[:40]: value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return [value(rng, depth - 1) for _ in range(rng.randint(0, 4))]


DRESSES = ("Str", "Int", "List", "Changing", "Raising", "Lying", "Faceless", "Endless", "NoItems", "Array", "PathLike")


def dressed(value: Any) -> Any:
    """JSON's values as what callers hand over: {"as": a class of tests.hostile, "value": what it is made of}."""
    if isinstance(value, list):
        return [dressed(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"as", "value"}:
        return {key: dressed(item) for key, item in value.items()}
    kind, inner = getattr(hostile, value["as"]), dressed(value["value"])
    if kind is hostile.Lying:
        return kind(type(inner))
    if kind is hostile.List and type(inner) is not list:  # of what has no end there is no list
        return kind()
    try:
        return kind(inner)
    except Exception:  # it is made of nothing, or of something else
        return kind()


def is_plain(value: object) -> bool:
    """Of built-in types, and of ours, to the last."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is LogitBias:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) in (SamplingParams, RepetitionDetectionParams):
        return all(is_plain(getattr(value, field.name)) for field in fields(value))  # type: ignore[arg-type]
    return type(value) in (type(None), bool, int, float, str, OutputKind)


def make(rng: random.Random) -> bytes:
    kind = rng.choice(list(_FIELDS))
    names = rng.sample(_FIELDS[kind], rng.randint(1, 4))
    return json.dumps([kind, {name: value(rng) for name in names}]).encode()


def check(data: bytes) -> None:
    name, values = json.loads(data)
    kind = next(kind for kind in _KINDS if kind.__name__ == name)
    try:
        with patch.object(exact, "MAX_ITEMS", 1 << 12):  # what has no end comes to it sooner
            made = kind(**{field: dressed(given) for field, given in values.items()})
    except (InvalidRequestError, ConfigError) as error:
        assert str(error).split(":")[0].split(".")[0] in _FIELDS[name], error
        return
    assert all(is_plain(getattr(made, field)) for field in values)
    assert kind(**{field: getattr(made, field) for field in values}) == made or name == "BeamSearchParams"
