"""Values from callers, taken once, as exact built-in types.

A caller's object may be a subclass with methods of its own, say another number each time it is asked, or never come to
an end. So it is read once, before it is checked, and what it raises is a refusal that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from numbers import Real
from operator import index
from typing import Any

from octavo.core.errors import InvalidRequestError, shown

MAX_ITEMS = 1 << 20  # of a list of token ids, words, or messages
MAX_CHARACTERS = 1 << 25  # of JSON in one request: documents of several million tokens
MAX_DIGITS = 4300  # of an integer written out: more Python does not read or write


def exact_int(field: str, value: object, what: str = "must be an integer") -> int:
    """NumPy's integers are welcome, bools are not."""
    try:
        if not isinstance(value, bool) and hasattr(value, "__index__"):
            return index(value)
    except Exception as error:
        raise InvalidRequestError(field, f"{what}: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"{what}, not {shown(value)}")


def exact_float(field: str, value: object) -> float:
    """NumPy's numbers are welcome, bools are not. Infinite where it is too large for a float."""
    try:
        if not isinstance(value, bool) and isinstance(value, Real):
            return float(value)
    except OverflowError:
        return math.inf
    except Exception as error:
        raise InvalidRequestError(field, f"must be a number: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"must be a number, not {shown(value)}")


def exact_str(field: str, value: object, what: str = "must be a string") -> str:
    """Of a subclass the characters that it holds, whatever its methods say."""
    if not isinstance(value, str):
        raise InvalidRequestError(field, f"{what}, not {shown(value)}")
    return str.__str__(value)


def exact_list(field: str, value: object, what: str = "must be a list") -> list[Any]:
    """The items of any iterable but strings and mappings, at most `MAX_ITEMS`."""
    try:
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping):
            items = list(islice(value, MAX_ITEMS + 1))
            if len(items) <= MAX_ITEMS:
                return items
            raise InvalidRequestError(field, f"{what} of at most {MAX_ITEMS} items")
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(field, f"{what}: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"{what}, not {shown(value)}")


def exact_dict(field: str, value: object, what: str = "must be a mapping") -> dict[Any, Any]:
    """The entries of any mapping."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(field, f"{what}, not {shown(value)}")
    entries = exact_list(field, _Items(value), what)
    try:
        return dict(entries)
    except Exception as error:  # a key's hash
        raise InvalidRequestError(field, f"{what}: reading it raised {_named(error)}") from None


class _Items:
    def __init__(self, value: Mapping[Any, Any]) -> None:
        self._value = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value.items())


class JsonRoom:
    """What is left of `MAX_ITEMS` values and `MAX_CHARACTERS` characters, for several JSON values together."""

    def __init__(self) -> None:
        self.values = MAX_ITEMS
        self.characters = MAX_CHARACTERS


def exact_json(field: str, value: Any, max_depth: int, room: JsonRoom | None = None) -> Any:
    """`value` rebuilt from JSON's types alone: lists, objects with strings for keys, and what stands in them. What
    stands there twice counts twice, in its values and in the characters of strings, keys and integers. `room`: of the
    values that it shares it with; its own without."""
    room = room or JsonRoom()

    def write(characters: int) -> None:
        room.characters -= characters
        if room.characters < 0:
            raise InvalidRequestError(field, f"up to here there are more than {MAX_CHARACTERS} characters")

    def text(value: str) -> str:
        exact = str.__str__(value)
        write(len(exact))
        return exact

    def take(value: Any, depth: int) -> Any:
        room.values -= 1
        if room.values < 0:
            raise InvalidRequestError(field, f"up to here there are more than {MAX_ITEMS} values")
        kind = type(value)
        if value is None or kind in (bool, float):
            return value
        if isinstance(value, str):  # of a subclass, such as an enumeration's, its characters
            return text(value)
        if depth >= max_depth:
            raise InvalidRequestError(field, f"nested more than {max_depth} deep")
        if kind is not list and isinstance(value, Mapping):
            entries = exact_dict(field, value)
            if not all(isinstance(key, str) for key in entries):
                raise InvalidRequestError(field, "every key must be a string")
            return {text(key): take(item, depth + 1) for key, item in entries.items()}
        if kind is list or isinstance(value, list | tuple):
            items = value if kind in (list, tuple) else exact_list(field, value)
            return [take(item, depth + 1) for item in items]
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, int):
            number = int.__int__(value)
            if number.bit_length() > 3 * MAX_DIGITS:
                raise InvalidRequestError(field, f"an integer may have at most {MAX_DIGITS} digits")
            write(number.bit_length() // 3)
            return number
        raise InvalidRequestError(field, f"{type(value).__name__} is not a JSON value")

    return take(value, 0)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error))}"
