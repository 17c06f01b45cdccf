"""Calls of tools in a model's output, as it comes: in the forms that chat templates of Hermes, Qwen and Llama teach.

- ``hermes``: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them, among text (Hermes 2
  Pro, Qwen 2.5 and 3).
- ``llama3_json``: the whole output is ``{"name": ..., "parameters": {...}}``, perhaps several with ``;`` between them,
  perhaps after ``<|python_tag|>`` (Llama 3.1 and later).

What does not turn out to be a call is text: nothing a model writes is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.core.errors import InvalidRequestError

FORMATS = ("hermes", "llama3_json")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_ARGUMENTS = {"hermes": "arguments", "llama3_json": "parameters"}
_MAX_HEAD = 1 << 12  # characters of a call before its arguments


def format_of(chat_template: str) -> str | None:
    """Which form a chat template teaches; None: none that is known."""
    if _OPEN in chat_template:
        return "hermes"
    if '"parameters"' in chat_template and ("python_tag" in chat_template or "ipython" in chat_template):
        return "llama3_json"
    return None


@dataclass(frozen=True, slots=True)
class CallBegun:
    index: int  # of the call in the output, from 0
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """Text of the arguments, JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Its arguments are whole."""

    index: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


Delta = CallBegun | ArgumentsDelta | CallEnded | TextDelta


@dataclass(slots=True)
class ToolCall:
    name: str
    arguments: str  # JSON


@dataclass(slots=True)
class ToolCalls:
    """All of an output."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self.text += delta.text
            elif isinstance(delta, CallBegun):
                self.calls.append(ToolCall(delta.name, ""))
            elif isinstance(delta, ArgumentsDelta):
                self.calls[delta.index].arguments += delta.text


class ToolCallParser:
    """Reads one output. `names`: of the tools there are; others are no calls."""

    def __init__(self, form: str, names: Sequence[str]) -> None:
        self._form = form
        self._names = frozenset(names)
        self._text = ""  # that is not decided yet
        self._index = -1  # of the last call
        self._arguments: _JsonEnd | None = None  # of the call that is being read
        self._closing = False  # behind a call's arguments, before its end
        self._after_call = False
        self._calls_only = form != "hermes"  # so far nothing but calls has come

    def feed(self, text: str) -> list[Delta]:
        """What is decided by now."""
        self._text += text
        deltas: list[Delta] = []
        while self._go_on(deltas, last=False):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """What is left when the output ends: a call that is not whole is text, unless its arguments have begun."""
        deltas: list[Delta] = []
        while self._go_on(deltas, last=True):
            pass
        if not self._closing:
            self._tell(deltas, self._text)
        self._text = ""
        return deltas

    def _go_on(self, deltas: list[Delta], *, last: bool) -> bool:
        """Whether there may be more to decide."""
        if self._arguments is not None:
            return self._read_arguments(deltas)
        if self._closing:
            return self._read_close()
        if self._form == "hermes":
            return self._find_open(deltas, last)
        return self._find_json(deltas, last)

    # --- where a call begins ---

    def _find_open(self, deltas: list[Delta], last: bool) -> bool:
        """Spaces around a call belong to nobody; those that may stand before one wait for what follows."""
        if self._after_call:
            self._text = self._text.lstrip()
        start = self._text.find(_OPEN)
        told = self._text if start < 0 else self._text[:start]
        if start < 0 and not last:
            told = told[: len(told) - _overlap(told, _OPEN)]
        if start >= 0 or not last:
            told = told.rstrip()
        self._tell(deltas, told)
        self._text = self._text[len(told) :]
        return start >= 0 and self._read_head(deltas, start - len(told) + len(_OPEN), last)

    def _find_json(self, deltas: list[Delta], last: bool) -> bool:
        text = self._text.lstrip()
        skipped = len(self._text) - len(text)
        if not self._calls_only:
            self._tell(deltas, self._text)
            self._text = ""
            return False
        if not last and (_PYTHON.startswith(text) and text != _PYTHON):
            return False
        if text.startswith(_PYTHON):
            skipped += len(_PYTHON)
        if self._text[skipped:].lstrip().startswith("{"):
            return self._read_head(deltas, skipped, last)
        if not self._text[skipped:].strip():
            return False
        self._calls_only = False
        return True

    def _read_head(self, deltas: list[Delta], start: int, last: bool) -> bool:
        """The name, and up to where the arguments begin."""
        head = self._text[start:]
        found = _head(head, _ARGUMENTS[self._form])
        if found is None and not last and len(head) < _MAX_HEAD:
            return False
        if not isinstance(found, tuple) or found[0] not in self._names:  # no call after all
            if self._form == "hermes":
                self._tell(deltas, self._text[:start])
                self._text = head
            else:
                self._calls_only = False
            return True
        name, length = found
        self._index += 1
        self._arguments = _JsonEnd()
        deltas.append(CallBegun(self._index, name))
        self._text = head[length:]
        return True

    # --- inside a call ---

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        assert self._arguments is not None
        end = self._arguments.find(self._text)
        taken = self._text if end is None else self._text[:end]
        if taken:
            deltas.append(ArgumentsDelta(self._index, taken))
        self._text = self._text[len(taken) :]
        if end is None:
            return False
        self._arguments, self._closing = None, True
        deltas.append(CallEnded(self._index))
        return True

    def _read_close(self) -> bool:
        """What stands between the arguments' end and the end of the call, or what parts it from the next."""
        text = self._text.lstrip()
        if not text:
            return False
        if text[0] == "}":
            self._text = text[1:]
            return True
        if self._form == "hermes":
            if _CLOSE.startswith(text) and text != _CLOSE:
                return False
            self._text = text.removeprefix(_CLOSE)
        else:
            self._text = text[1:] if text[0] in ";," else text
        self._closing, self._after_call = False, True
        return True

    def _tell(self, deltas: list[Delta], text: str) -> None:
        if text:
            self._after_call = False
            deltas.append(TextDelta(text))


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _head(text: str, arguments: str) -> tuple[str, int] | bool | None:
    """Name, and where the arguments begin, of ``{"name": ..., "arguments": {``; None: not all of it is there; False: it
    is something else."""
    found = _Reader(text)
    if not found.take("{"):
        return found.verdict
    name = None
    while True:
        key = found.string()
        if key is None or not found.take(":"):
            return found.verdict
        if key == arguments:
            if name is None:
                return False  # they come first: it cannot be streamed, and nobody teaches it so
            found.spaces()
            if found.at_end:
                return None
            return (name, found.place) if found.text[found.place] == "{" else False
        value = found.string()
        if value is None:
            return found.verdict
        if key == "name":
            name = value
        if not found.take(","):
            return found.verdict


class _Reader:
    """Of the beginning of a JSON object."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    @property
    def at_end(self) -> bool:
        return self.place >= len(self.text)

    @property
    def verdict(self) -> bool | None:
        """After a failure: None if more text may mend it."""
        return None if self.at_end else False

    def spaces(self) -> None:
        while not self.at_end and self.text[self.place] in " \t\r\n":
            self.place += 1

    def take(self, mark: str) -> bool:
        self.spaces()
        if self.at_end or self.text[self.place] != mark:
            return False
        self.place += 1
        return True

    def string(self) -> str | None:
        self.spaces()
        if self.at_end or self.text[self.place] != '"':
            return None
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(self.text, self.place)
        except json.JSONDecodeError:
            self.place = len(self.text)  # it goes on
            return None
        self.place = end
        return str(value)


class _JsonEnd:
    """Finds where a JSON object ends, in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The character behind its end."""
        for place, c in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = c == "\\"
                self._in_string = c != '"'
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


def parse(form: str, text: str, names: Sequence[str]) -> ToolCalls:
    """A whole output."""
    parser, found = ToolCallParser(form, names), ToolCalls()
    found.add(parser.feed(text))
    found.add(parser.finish())
    return found


ANY_TEXT = "text"
# A call begins where its opening stands, or for Llama where the output begins like JSON: what is text the parser knows
# by the same.
_TEXT = "TEXT: /(.|\\n)*/\nopening[lazy]: TEXT " + json.dumps(_OPEN) + "\ncall: opening head"
_NO_JSON = "TEXT: /([^{ \\t\\r\\n](.|\\n)*)?/"
_TEXT_AND_CALLS = {
    ("hermes", True): f"start: call* TEXT\n{_TEXT}",
    ("hermes", False): f"start: TEXT | call\n{_TEXT}",
    ("llama3_json", True): f'start: TEXT | call ("; " call)*\n{_NO_JSON}',
    ("llama3_json", False): f"start: TEXT | call\n{_NO_JSON}",
}


def call_grammar(form: str, tools: Sequence[Mapping[str, Any]], *, several: bool, beside: str | None = None) -> str:
    """A grammar, in the Lark form of llguidance, of calls of these tools whose arguments fit the schemas.

    Args:
        tools: ``{"name": ..., "parameters": a JSON schema}``.
        several: more than one call may follow each other.
        beside: what the output may be instead: `ANY_TEXT`, in which calls may stand as the form has it, or JSON by a
            schema, of which this is the text. None: a call is demanded.
    """
    if not tools:
        raise InvalidRequestError("tools", "are needed for a call")
    if beside == ANY_TEXT:
        rules = [_TEXT_AND_CALLS[form, several]]
    else:
        between = '"\\n"' if form == "hermes" else '"; "'
        calls = f"call ({between} call)*" if several else "call"
        rules = [f"start: {calls}" if beside is None else f"start: answer | {calls}"]
        if beside is not None:
            rules.append(f"answer: %json {beside}")
        if form == "hermes":
            rules.append(f"call: {_quoted(_OPEN)} head")
    head = "head" if form == "hermes" else "call"
    rules.append(f"{head}: " + " | ".join(f"call{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        opened = _json({"name": tool["name"]})[:-1] + f', "{_ARGUMENTS[form]}": '
        closed = "}"
        if form == "hermes":
            opened, closed = "\n" + opened, f"}}\n{_CLOSE}"
        rules.append(f"call{number}: {_quoted(opened)} args{number} {_quoted(closed)}")
        rules.append(f"args{number}: %json {_json(tool.get('parameters') or {'type': 'object'})}")
    # In JSON this stands in strings alone, where it may be written so; as it is it would be the mark of another form.
    return "\n".join(rules).replace("::=", r":\u003a=")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    """As a string of Lark's."""
    return _json(text)
