"""Settings as fields of a dataclass. What each is stands at its field, once: its type, default, range and help.

From there come keywords, flags (``--max-num-seqs``), variables (``OCTAVO_MAX_NUM_SEQS``), keys of configuration files,
and what is checked of them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import field, fields
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from octavo.core.errors import ConfigError, shown

ENV_PREFIX = "OCTAVO_"
_MOST_PARTS = 64  # of a list
BOOLS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}

Settings = TypeVar("Settings")


class Given(NamedTuple):
    """A value that somebody gave a setting."""

    value: Any
    source: str  # as they wrote it: a flag, a variable, a file's line


def setting(
    default: Any,
    help: str,  # noqa: A002 - argparse's word
    **limits: Any,
) -> Any:
    """A field.

    Args:
        help: one sentence. The default is told behind it, unless it is nothing.
        limits: `choices`, or a function that gives them; `low`, `high` (included) and `above` (not included) of
            numbers; of lists: `separator` between parts in a variable, without which it is one part, and `adds_up` for
            one whose parts come from all sources together; `secret` for a value that nothing tells.
    """
    if "secret" in limits:  # reprs end in logs
        return field(default=default, repr=False, metadata={"help": help, **limits})
    return field(default=default, metadata={"help": help, **limits})


def flag(name: str) -> str:
    """``max_num_seqs`` -> ``--max-num-seqs``"""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """``max_num_seqs`` -> ``OCTAVO_MAX_NUM_SEQS``"""
    return ENV_PREFIX + name.upper()


# get_type_hints compiles each annotation anew in every call.
type_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """Its type without parameters, and whether None is a value."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    (kind,) = [part for part in parts if part is not type(None)]
    return get_origin(kind) or kind, len(parts) > 1


def choices_of(limits: Mapping[str, Any]) -> Collection[Any] | None:
    """The values that a setting may have, by its metadata; None: not a choice."""
    choices = limits.get("choices")
    return choices() if callable(choices) else choices


# --- from text ---


def parsed(name: str, text: str, hint: Any, limits: Mapping[str, Any]) -> Any:
    """A setting's value from text, not yet checked. Raises ConfigError naming it."""
    kind, _ = kind_of(hint)
    if kind is str:
        return text
    if kind is tuple:
        separator = limits.get("separator")
        return (text,) if separator is None else tuple(part.strip() for part in text.split(separator))
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ConfigError(f"{name}: must be true or false, not {shown(text)}")
        return BOOLS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ConfigError(f"{name}: must be {_A[kind]}, not {shown(text)}") from None
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: must be a JSON object such as {kind.example}, not {shown(text)}") from None


def from_environment(kind: type, environ: Mapping[str, str]) -> dict[str, Given]:
    """What variables say. An empty one is as if it were not there. Raises ConfigError naming the variable."""
    found: dict[str, Given] = {}
    for one in fields(kind):
        name = variable(one.name)
        if text := environ.get(name):
            found[one.name] = Given(parsed(name, text, type_hints(kind)[one.name], one.metadata), name)
    return found


def made(kind: type[Settings], given: Mapping[str, Given]) -> Settings:
    """Of what was given. Raises ConfigError naming a setting at fault as it was written, but by its own name if that
    was as a flag, and likewise without a source."""
    try:
        return kind(**{name: one.value for name, one in given.items()})
    except ConfigError as error:
        path, colon, problem = str(error).partition(": ")
        name, dot, part = path.partition(".")
        one = given.get(name)
        if one is None or not one.source or one.source.startswith("-"):
            raise
        raise ConfigError(f"{one.source}{dot}{part}{colon}{problem}") from None


# --- checks ---

_A = {str: "a string", int: "an integer", float: "a number"}


def check_settings(settings: Any) -> None:
    """Replace each field by its checked value: for ``__post_init__``. Raises ConfigError naming the field."""
    hints = type_hints(type(settings))
    for one in fields(settings):
        value = checked(one.name, getattr(settings, one.name), hints[one.name], one.metadata)
        object.__setattr__(settings, one.name, value)


def checked(name: str, given: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """The value, of a subclass of its type what it holds."""
    kind, optional = kind_of(hint)
    if given is None and optional:
        return None
    if kind is bool:
        if given is not True and given is not False:
            raise ConfigError(f"{name}: must be true or false, not {shown(given)}")
        return given
    if kind is tuple:
        return _parts(name, given, limits)
    if kind not in _A:
        return kind.of(name, given)
    value = _plain(kind, given)
    if value is None:
        raise ConfigError(f"{name}: must be {_A[kind]}, not {shown(given)}")
    choices = choices_of(limits)
    if choices is not None and value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(map(str, choices))}, not {shown(value)}")
    if kind is not str:
        _check_range(name, value, limits)
    return value


def _plain(kind: type, given: Any) -> Any:
    """As the built-in type itself; None if it is of another one. `__class__` may say anything."""
    actual = type(given)
    if issubclass(actual, bool):
        return None
    if kind is float:
        try:
            value = float.__float__(given) if issubclass(actual, float) else float(int.__int__(given))
        except (TypeError, OverflowError):
            return None
        return value if math.isfinite(value) else None
    if not issubclass(actual, kind):
        return None
    return str.__str__(given) if kind is str else int.__int__(given)


def _check_range(name: str, value: float, limits: Mapping[str, Any]) -> None:
    if "low" in limits and value < limits["low"]:
        raise ConfigError(f"{name}: must be at least {limits['low']}, not {shown(value)}")
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(f"{name}: must be more than {limits['above']}, not {shown(value)}")
    if "high" in limits and value > limits["high"]:
        raise ConfigError(f"{name}: must be at most {limits['high']}, not {shown(value)}")


def _parts(name: str, given: Any, limits: Mapping[str, Any]) -> tuple[str, ...]:
    """Strings, each once. They may be secret: no error tells one."""
    if not isinstance(given, str | list | tuple):
        raise ConfigError(f"{name}: must be a string or a list of strings, not {type(given).__name__}")
    parts = [_plain(str, one) for one in ((given,) if isinstance(given, str) else given)]
    if not all(parts):
        raise ConfigError(f"{name}: must be strings, not empty")
    if len(parts) > (most := limits.get("high", _MOST_PARTS)):
        raise ConfigError(f"{name}: at most {most} may be given, not {len(parts)}")
    return tuple(dict.fromkeys(parts))
