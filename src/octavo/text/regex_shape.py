"""Which regular expressions of a tokenizer may run on text: such as cannot take exponential time.

The tokenizers library searches by backtracking. What takes exponential time there is repetition inside of repetition,
and repetition of alternatives that may match the same. Neither is in the expressions of known models: there only
single characters, and groups of a fixed number of them, are repeated. References back, recursion and conditions are not
either.
"""

from __future__ import annotations

import re

MAX_PATTERN = 8192  # characters
_MAX_REPEATS = 1000  # that are written out, {1000}: the library makes copies
_MAX_DEPTH = 20
_GROUP = re.compile(r"\(\?(?:[imsx]+(?:-[imsx]+)?:|[imsx]+\)|:|=|!|<=|<!|>)")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,6})?(,)?(\d{1,6})?\})[?+]?")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w ]{1,40}\}|x\{[0-9a-fA-F]{1,6}\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9kgKRXyYpPxu])"
)


class UnsafePatternError(ValueError):
    """Why an expression is not run."""


def check_pattern(pattern: str) -> None:
    """Raises UnsafePatternError."""
    if len(pattern) > MAX_PATTERN:
        raise UnsafePatternError(f"an expression of more than {MAX_PATTERN} characters")
    end, _ = _alternatives(pattern, 0, 0)
    if end < len(pattern):
        raise UnsafePatternError("a closing parenthesis without an opening one")


def _alternatives(pattern: str, at: int, depth: int) -> tuple[int, bool]:
    """Where what begins at `at` ends, and whether it matches in one way only: one sequence without choices."""
    if depth > _MAX_DEPTH:
        raise UnsafePatternError(f"groups nested more than {_MAX_DEPTH} deep")
    fixed, before = True, ""
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            at, fixed, before = at + 1, False, ""
            continue
        start = at
        at, plain = _atom(pattern, at, depth)
        atom = pattern[start:at]
        at, least, most = _quantifier(pattern, at)
        if most > 1 and least < most and atom == before:
            raise UnsafePatternError(f"two repetitions of {atom[:40]} in a row")
        before = atom if most > 1 and least < most else ""
        if not plain and most != 1:
            raise UnsafePatternError("repetition of a group that has repetitions or alternatives in it")
        fixed = fixed and plain and least == most
    return at, fixed


def _atom(pattern: str, at: int, depth: int) -> tuple[int, bool]:
    """Where a character, class or group ends, and whether it matches in one way only."""
    char = pattern[at]
    if char == "\\":
        return _escape(pattern, at), True
    if char == "[":
        return _char_class(pattern, at, depth), True
    if char != "(":
        return at + 1, True
    start = at + 1
    if pattern[start : start + 1] in ("?", "*"):
        found = _GROUP.match(pattern, at)
        if found is None:
            raise UnsafePatternError(f"the kind of group at {pattern[at : at + 5]!r}")
        start = found.end()
        if found[0].endswith(")"):
            return start, True
    end, fixed = _alternatives(pattern, start, depth + 1)
    if end >= len(pattern):
        raise UnsafePatternError("an opening parenthesis without a closing one")
    return end + 1, fixed


def _quantifier(pattern: str, at: int) -> tuple[int, int, float]:
    """Where it ends, and how often what stands before it comes."""
    found = _QUANTIFIER.match(pattern, at)
    if found is None:
        return at, 1, 1
    least, comma, most = found.groups()
    if pattern[at] != "{":
        bounds = {"*": (0, float("inf")), "+": (1, float("inf")), "?": (0, 1.0)}[pattern[at]]
    elif least is None and most is None:
        return at, 1, 1  # a brace as such
    else:
        low = int(least or 0)
        bounds = low, float(most) if most else float("inf") if comma else float(low)
        if max(low, int(most or 0)) > _MAX_REPEATS:
            raise UnsafePatternError(f"a repetition of more than {_MAX_REPEATS}")
    if _QUANTIFIER.match(pattern, found.end()) and pattern[found.end()] != "{":
        raise UnsafePatternError("a repetition of a repetition")
    if _QUANTIFIER.match(pattern, found.end()) and re.match(r"\{\d*,?\d+\}|\{\d+,\}", pattern[found.end() :]):
        raise UnsafePatternError("a repetition of a repetition")
    return found.end(), bounds[0], bounds[1]


def _escape(pattern: str, at: int) -> int:
    found = _ESCAPE.match(pattern, at)
    if found is None:
        raise UnsafePatternError(f"the escape at {pattern[at : at + 4]!r}")
    return found.end()


def _char_class(pattern: str, at: int, depth: int) -> int:
    """Where the class that begins at `at` ends; classes may stand in it."""
    if depth > _MAX_DEPTH:
        raise UnsafePatternError(f"classes nested more than {_MAX_DEPTH} deep")
    at += 1
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":  # the first is a bracket as such
        at += 1
    while at < len(pattern):
        if pattern[at] == "]":
            return at + 1
        if pattern[at] == "\\":
            at = _escape(pattern, at)
        elif pattern[at] == "[" and pattern[at : at + 2] == "[:":
            found = re.compile(r"\[:\^?\w{1,20}:\]").match(pattern, at)
            at = found.end() if found else at + 1
        elif pattern[at] == "[":
            at = _char_class(pattern, at, depth + 1)
        else:
            at += 1
    raise UnsafePatternError("a class without its end")


def trial_texts(pattern: str) -> list[str]:
    """Runs of one character, of each kind that expressions tell apart and of those in `pattern`, before others: where
    several repetitions can share out such a run in many ways, the library gives up on it."""
    written = re.sub(r"\\[pP]\{.*?\}", "", _CODE.sub(_char_of, pattern))
    own = dict.fromkeys(char for char in written if char not in "\\()[]{}|*+?^$")
    kinds = dict.fromkeys(" \n\r\t\u00a0aAéʰ\u0301中0²'-_.,!?$<\u200d😀\x01")
    tail = "".join(own) + "a!"
    return [char * _RUN + tail for char in (*kinds, *list(own)[:64])]


def _char_of(code: re.Match[str]) -> str:
    number = int(code[1] or code[2] or code[3], 16)
    return chr(number) if number < 0xD800 or 0xDFFF < number < 0x110000 else ""


_CODE = re.compile(r"\\(?:x\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))")
_RUN = 600  # so many can be shared out in three in 10 million ways, which is where the library's search gives up
