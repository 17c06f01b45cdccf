"""Values from callers, taken once, as exact built-in types.

A caller's object may be a subclass with methods of its own, say another number each time it is asked, or never come to
an end. So it is read once, before it is checked, and what it raises is a refusal that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from numbers import Real
from operator import index
from typing import Any, TypeVar

from octavo.core.errors import InvalidRequestError, shown

Record = TypeVar("Record")
MAX_ITEMS = 1 << 20  # of a list of token ids, words, or messages
MAX_CHARACTERS = 1 << 25  # of JSON in one request: documents of several million tokens
MAX_DIGITS = 4300  # of an integer written out: more Python does not read or write


def is_a(value: object, kind: Any) -> bool:
    """Whether `value` is of a type, or one of several: by its type, since `__class__`, which isinstance asks as well,
    may be code of the caller's."""
    return issubclass(type(value), kind)


def exact_bool(field: str, value: object, allowed: str = "must be true or false") -> bool:
    """NumPy's are welcome."""
    if value is True or value is False:
        return value
    kind = type(value)
    try:
        if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):
            return bool(value)
    except Exception as error:
        raise InvalidRequestError(field, f"{allowed}: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"{allowed}, not {shown(value)}")


def exact_int(field: str, value: object, allowed: str = "must be an integer") -> int:
    """NumPy's integers are welcome, bools are not."""
    try:
        if not is_a(value, bool) and hasattr(type(value), "__index__"):
            return index(value)  # type: ignore[arg-type] # it has one
    except Exception as error:
        raise InvalidRequestError(field, f"{allowed}: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"{allowed}, not {shown(value)}")


def exact_float(field: str, value: object) -> float:
    """NumPy's numbers are welcome, bools are not. Infinite where it is too large for a float."""
    try:
        if not is_a(value, bool) and is_a(value, Real):
            return float(value)  # type: ignore[arg-type] # a number
    except OverflowError:
        return math.inf
    except Exception as error:
        raise InvalidRequestError(field, f"must be a number: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"must be a number, not {shown(value)}")


def exact_str(field: str, value: object, allowed: str = "must be a string") -> str:
    """Of a subclass the characters that it holds, whatever its methods say."""
    if not is_a(value, str):
        raise InvalidRequestError(field, f"{allowed}, not {shown(value)}")
    return str.__str__(value)


def check_unicode(field: str, text: str) -> None:
    """Raises InvalidRequestError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InvalidRequestError(field, f"lone surrogate U+{code:04X} at character {error.start}") from None


def exact_list(field: str, value: object, allowed: str = "must be a list") -> list[Any]:
    """The items of any iterable but strings and mappings, at most `MAX_ITEMS`."""
    try:
        if is_a(value, Iterable) and not is_a(value, (str, bytes, bytearray, Mapping)):
            items = list(islice(value, MAX_ITEMS + 1))  # type: ignore[call-overload] # an iterable
            if len(items) <= MAX_ITEMS:
                return items
            raise InvalidRequestError(field, f"{allowed} of at most {MAX_ITEMS} items")
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(field, f"{allowed}: reading it raised {_named(error)}") from None
    raise InvalidRequestError(field, f"{allowed}, not {shown(value)}")


def exact_dict(field: str, value: object, allowed: str = "must be a mapping") -> dict[Any, Any]:
    """The entries of any mapping."""
    if not is_a(value, Mapping):
        raise InvalidRequestError(field, f"{allowed}, not {shown(value)}")
    entries = exact_list(field, _Items(value), allowed)  # type: ignore[arg-type] # a mapping
    try:
        return dict(entries)
    except Exception as error:  # a key's hash
        raise InvalidRequestError(field, f"{allowed}: reading it raised {_named(error)}") from None


def exact_fields(field: str, value: object, allowed: str = "must be a mapping") -> dict[str, Any]:
    """The entries of a mapping whose keys are strings."""
    return {
        exact_str(field, key, "every key must be a string"): item
        for key, item in exact_dict(field, value, allowed).items()
    }


def exact_record(field: str, value: object, kind: type[Record]) -> Record:
    """A frozen dataclass that checks its fields. Of a subclass, which may have left that out, one made anew."""
    if type(value) is kind:
        return value
    if not is_a(value, kind):
        raise InvalidRequestError(field, f"must be {kind.__name__}, not {type(value).__name__}")
    try:
        given = {one.name: getattr(value, one.name) for one in fields(kind) if one.init}  # type: ignore[arg-type]
    except Exception as error:
        raise InvalidRequestError(field, f"reading it raised {_named(error)}") from None
    return kind(**given)


class _Items:
    def __init__(self, value: Mapping[Any, Any]) -> None:
        self._value = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value.items())


class JsonRoom:
    """What is left of `MAX_ITEMS` values and of so many characters, for several JSON values together."""

    def __init__(self, most: int = MAX_CHARACTERS) -> None:
        self.most = most
        self.values = MAX_ITEMS
        self.characters = most


def exact_json(field: str, value: Any, max_depth: int, room: JsonRoom | None = None) -> Any:
    """`value` rebuilt from JSON's types alone: lists, objects with strings for keys, and what stands in them. What
    stands there twice counts twice, in its values and in the characters of strings, keys and integers. `room`: of the
    values that it shares it with; its own without."""
    room = room or JsonRoom()

    def write(characters: int) -> None:
        room.characters -= characters
        if room.characters < 0:
            raise InvalidRequestError(field, f"up to here there are more than {room.most} characters")

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
        if is_a(value, str):  # of a subclass, such as an enumeration's, its characters
            return text(value)
        if depth >= max_depth:
            raise InvalidRequestError(field, f"nested more than {max_depth} deep")
        if kind is not list and is_a(value, Mapping):
            entries = exact_dict(field, value)
            if not all(is_a(key, str) for key in entries):
                raise InvalidRequestError(field, "every key must be a string")
            return {text(key): take(item, depth + 1) for key, item in entries.items()}
        if kind is list or is_a(value, (list, tuple)):
            items = value if kind in (list, tuple) else exact_list(field, value)
            return [take(item, depth + 1) for item in items]
        if is_a(value, float):
            return float.__float__(value)
        if is_a(value, int):
            number = int.__int__(value)
            if number.bit_length() > 3 * MAX_DIGITS:
                raise InvalidRequestError(field, f"an integer may have at most {MAX_DIGITS} digits")
            write(number.bit_length() // 3)
            return number
        raise InvalidRequestError(field, f"{type(value).__name__} is not a JSON value")

    return take(value, 0)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error))}"
