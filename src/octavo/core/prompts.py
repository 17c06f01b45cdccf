"""Prompts that a user can replace: texts with holes, such as ``{question}``, that are filled in once."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.values import exact_fields, exact_record, exact_str, is_a

Prompts = TypeVar("Prompts")
MAX_PROMPT = 1 << 16  # characters
_HOLE = re.compile(r"\{([a-z]+)\}")


def filled(prompt: str, **values: str) -> str:
    """A prompt with its holes filled; what is put in is not looked at again, and other braces stay as they are."""
    return _HOLE.sub(lambda match: values.get(match[1], match[0]), prompt)


def check_prompt(
    field: str, value: object, needed: Collection[str], allowed: Collection[str], known: Collection[str]
) -> str:
    """Of the holes that are `known`, it must hold each that is `needed` once and may hold those that are `allowed`.
    Raises InvalidRequestError naming the field."""
    text = exact_str(field, value)
    if len(text) > MAX_PROMPT:
        raise InvalidRequestError(field, f"may have at most {MAX_PROMPT} characters, not {len(text)}")
    found = _HOLE.findall(text)
    if foreign := set(found) & set(known) - {*needed, *allowed}:
        raise InvalidRequestError(field, f"has no {{{min(foreign)}}} to put in")
    for name in needed:
        if found.count(name) != 1:
            raise InvalidRequestError(field, f"must hold {{{name}}} once, not {found.count(name)} times")
    return text


def prompts_of(field: str, value: object, kind: type[Prompts]) -> Prompts:
    """A record of prompts, or one made of a mapping of some of its fields. Raises InvalidRequestError."""
    if is_a(value, kind):
        return exact_record(field, value, kind)
    given = exact_fields(field, value, f"must be {kind.__name__} or a mapping")
    allowed = [one.name for one in fields(kind)]  # type: ignore[arg-type] # a dataclass
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(field, f"{shown(name)} is not a field; allowed are {', '.join(allowed)}")
    made: Any = kind(**given)
    return made  # type: ignore[no-any-return]
