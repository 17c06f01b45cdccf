"""Which regular expressions of a tokenizer may run on text: such as take time in proportion to its length.

The tokenizers library searches by backtracking, from every place of the text where the search before did not end. So
an expression is taken if what it costs at one place is bounded but for runs, and every run of characters is walked a
bounded number of times:

- Single characters, and groups of a fixed number of them, are repeated; never what has repetitions or alternatives.
- Where something may fail after a repetition without bound, another alternative must take the run that was walked, as
  ``\\s+`` does in ``\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+``. Between the two stand only alternatives that walk the same run.
- Nothing may fail after a second such repetition, and none stands inside a group or a lookaround.

References back, recursion and conditions are refused too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_PATTERN = 8192  # characters
MAX_STEPS = 1024  # at one place of a text, by all expressions of a file; those of known models take some 100
# Expressions of known models that take time in the square of a run of what is named here: texts with runs of more than
# MAX_RUN are not for them.
SLOW = {
    r"\s+$": r"\s",
    r"\d{1,3}(?=(?:\d{3})*\b)": r"\d",
    r"(?=(\d{3})+(?!\d))": r"\d",
}
MAX_RUN = 1000
_MAX_REPEATS = 1000  # that are written out, {1000}: the library makes copies
_MAX_DEPTH = 20
_MAX_PREFIX = 4  # characters before a repetition that something may fail after: from so many places it is walked
_LONG = 16  # more repetitions than these count as any number
_GROUP = re.compile(r"\(\?(?:[im]+(?:-[im]+)?:|:|=|!|<=|<!|>)")
_FLAGS = re.compile(r"\(\?[im]+\)")
_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d{1,6})?(,)?(\d{1,6})?\}[*+?]?")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w ]{1,40}\}|x\{[0-9a-fA-F]{1,6}\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[AzZbBdDsSwWhHnrtfvae]|\W)"
)


class UnsafePatternError(ValueError):
    """Why an expression is not run."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A character, class, group or assertion, and how often it comes."""

    text: str  # without the quantifier
    least: int = 1
    most: float = 1
    branches: list[list[_Item]] = field(default_factory=list)  # of a group
    looks: bool = False  # takes no characters
    lazy: bool = False
    nested: bool = False  # {1,3}+: the library repeats the repetition

    @property
    def endless(self) -> bool:
        return self.most > _LONG and self.most != self.least

    @property
    def ways(self) -> int:
        """In how many it may match, but for those of a run."""
        inner = sum(math.prod(item.ways for item in branch) for branch in self.branches) or 1
        repeats = 1 if self.endless else int(self.most) - self.least + 1
        return repeats if self.looks else repeats * inner

    @property
    def steps(self) -> int:
        """That one attempt may take, but for those of a run."""
        inner = sum(map(_steps, self.branches)) or 1
        return inner * max(1, self.least if self.endless else int(self.most))

    @property
    def length(self) -> float:
        """Most characters that it takes."""
        inner = max((sum(item.length for item in branch) for branch in self.branches), default=1)
        return 0 if self.looks else inner * self.most


def check_pattern(pattern: str) -> int:
    """How many steps a search may take at one place of a text, but for runs. Raises UnsafePatternError."""
    if len(pattern) > MAX_PATTERN:
        raise UnsafePatternError(f"an expression of more than {MAX_PATTERN} characters")
    flags = _FLAGS.match(pattern)
    end, branches = _alternatives(pattern, flags.end() if flags else 0, 0)
    if end < len(pattern):
        raise UnsafePatternError("a closing parenthesis without an opening one")
    if pattern in SLOW:
        return MAX_RUN // 4  # so that a file has few of them
    _check_runs(_flat(branches))
    steps = sum(map(_steps, branches))
    if steps > MAX_STEPS:
        raise UnsafePatternError(f"it may take {steps} steps at every character; {MAX_STEPS} are most")
    return steps


def _steps(branch: Sequence[_Item]) -> int:
    steps, ways = 0, 1
    for item in branch:
        steps += ways * item.steps
        ways *= item.ways
    return steps


# --- runs ---


def _flat(branches: list[list[_Item]]) -> list[list[_Item]]:
    """Groups that are a whole alternative, taken apart."""
    found: list[list[_Item]] = []
    for branch in branches:
        only = branch[0] if len(branch) == 1 else None
        plain = only is not None and only.branches and only.least == only.most == 1
        if only is not None and plain and re.match(r"\((?!\?)|\(\?:", only.text):
            found += _flat(only.branches)
        else:
            found.append(branch)
    return found


def _check_runs(branches: list[list[_Item]]) -> None:
    for branch in branches:
        for item in branch:
            if any(map(_has_endless, item.branches)):
                raise UnsafePatternError(f"a repetition without bound inside of {item.text[:40]}")
    walked = [_walked(branch) for branch in branches]
    for number, run in enumerate(walked):
        if run is not None and not _is_taken(run, number, branches, walked):
            raise UnsafePatternError(f"something may fail after {run[:40]} repeated, and no alternative takes the rest")


def _is_taken(run: str, number: int, branches: list[list[_Item]], walked: list[str | None]) -> bool:
    """Whether what an alternative has walked in vain is then taken by another one."""
    if any(_takes(branch, run) for branch in branches[:number]):
        return True  # it is never reached at such a run
    for branch, also in zip(branches[number + 1 :], walked[number + 1 :], strict=True):
        if _takes(branch, run):
            return True
        if also != run:
            return False
    return False


def _has_endless(branch: list[_Item]) -> bool:
    return any(item.endless or any(map(_has_endless, item.branches)) for item in branch)


def _may_fail(items: Sequence[_Item]) -> bool:
    return any(item.least > 0 for item in items)


def _walked(branch: list[_Item]) -> str | None:
    """What run an alternative may walk and yet fail; None where it takes whatever it has walked."""
    found = None
    for number, item in enumerate(branch):
        if not item.endless or not _may_fail(branch[number + 1 :]) or _all_but_one(branch):
            continue
        if item.nested or any(before.endless for before in branch[:number]):
            raise UnsafePatternError(f"something may fail after a repetition of {item.text[:40]}, of many")
        if sum(before.length for before in branch[:number]) > _MAX_PREFIX:
            raise UnsafePatternError(f"more than {_MAX_PREFIX} characters before a repetition of {item.text[:40]}")
        found = item.text
    return found


def _all_but_one(branch: list[_Item]) -> bool:
    r"""``\s+(?!\S)`` takes a run but for its last character, and a run of one is no walk."""
    first, *rest = branch
    return first == _Item(r"\s", 1, math.inf) and [(item.text, item.least) for item in rest] == [(r"(?!\S)", 1)]


def _takes(branch: list[_Item], run: str) -> bool:
    """Whether an alternative takes, from anywhere in such a run, all of it."""
    for number, item in enumerate(branch):
        if item.text == run and item.most == math.inf and item.least <= 1 and not item.lazy and not item.nested:
            return not _may_fail(branch[number + 1 :]) or _all_but_one(branch)
        if item.least > 0 or item.endless:
            return False
    return False


# --- reading ---


def _alternatives(pattern: str, at: int, depth: int) -> tuple[int, list[list[_Item]]]:
    """Where what begins at `at` ends, and its alternatives."""
    if depth > _MAX_DEPTH:
        raise UnsafePatternError(f"groups nested more than {_MAX_DEPTH} deep")
    branches: list[list[_Item]] = [[]]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            at += 1
            branches.append([])
            continue
        at, item = _item(pattern, at, depth)
        branches[-1].append(item)
    return at, branches


def _item(pattern: str, at: int, depth: int) -> tuple[int, _Item]:
    start = at
    branches: list[list[_Item]] = []
    if pattern[at] == "\\":
        at = _escape(pattern, at)
    elif pattern[at] == "[":
        at = _char_class(pattern, at, depth)
    elif pattern[at] != "(":
        at += 1
    else:
        at, branches = _group(pattern, at, depth)
    text = pattern[start:at]
    looks = text in ("^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z") or text.startswith(("(?=", "(?!", "(?<"))
    at, least, most = _quantifier(pattern, at)
    written = pattern[start + len(text) : at]
    if written and looks:
        raise UnsafePatternError(f"a repetition of {text[:40]}, which takes no characters")
    if most != 1 and (len(branches) > 1 or any(i.branches or i.least != i.most for b in branches for i in b)):
        raise UnsafePatternError("repetition of a group that has repetitions or alternatives in it")
    lazy, nested = len(written) > 1 and written.endswith("?"), written.endswith("}+")
    return at, _Item(text, least, most, branches, looks, lazy, nested)


def _group(pattern: str, at: int, depth: int) -> tuple[int, list[list[_Item]]]:
    start = at + 1
    if pattern[start : start + 1] in ("?", "*"):
        found = _GROUP.match(pattern, at)
        if found is None:
            raise UnsafePatternError(f"the kind of group at {pattern[at : at + 5]!r}")
        start = found.end()
    end, branches = _alternatives(pattern, start, depth + 1)
    if end >= len(pattern):
        raise UnsafePatternError("an opening parenthesis without a closing one")
    return end + 1, branches


def _quantifier(pattern: str, at: int) -> tuple[int, int, float]:
    """Where it ends, and how often what stands before it comes."""
    found = _QUANTIFIER.match(pattern, at)
    if found is None:
        return at, 1, 1
    least, comma, most = found.groups()
    if pattern[at] != "{":
        low, high = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1.0)}[pattern[at]]
    elif least is None and most is None:
        return at, 1, 1  # a brace as such
    else:
        low = int(least or 0)
        high = float(most) if most else math.inf if comma else float(low)
        if max(low, int(most or 0)) > _MAX_REPEATS:
            raise UnsafePatternError(f"a repetition of more than {_MAX_REPEATS}")
        if high < low or (not comma and found[0].endswith("?")) or found[0].endswith("*"):
            raise UnsafePatternError(f"the repetition {found[0]}")
        if found[0].endswith("+"):
            high = math.inf
    more = _QUANTIFIER.match(pattern, found.end())
    if more and (more[0][0] != "{" or more[1] or more[3]):
        raise UnsafePatternError("a repetition of a repetition")
    return found.end(), low, high


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
