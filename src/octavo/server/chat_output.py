"""From the text of an answer to what stands in it: content, and calls of tools; and these as a message of a chat. A
reader of something else in it, such as reasoning, is another `OutputReader`, made in `reader_for`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from octavo.text.tool_calls import ArgumentsDelta, CallBegun, Delta, TextDelta, ToolCallParser, ToolCalls


class OutputReader(Protocol):
    """Reads one output, piece by piece."""

    def read(self, text: str, *, last: bool) -> list[Delta]:
        """What new text turns out to be; nothing if that is not decided yet."""
        ...

    def finish_reason(self, reason: str | None) -> str | None:
        """What the answer ends with, of what the engine says."""
        ...


class ContentReader:
    """All text is content."""

    def read(self, text: str, *, last: bool) -> list[Delta]:
        del last
        return [TextDelta(text)] if text else []

    def finish_reason(self, reason: str | None) -> str | None:
        return reason


class ToolCallReader:
    """Text in which calls of tools may stand; see octavo.text.tool_calls."""

    def __init__(self, form: str, names: Sequence[str]) -> None:
        self._parser = ToolCallParser(form, names)
        self._calls = False

    def read(self, text: str, *, last: bool) -> list[Delta]:
        deltas = self._parser.feed(text)
        if last:
            deltas += self._parser.finish()
        self._calls = self._calls or any(isinstance(one, CallBegun) for one in deltas)
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._calls else reason


def reader_for(form: str | None, names: Sequence[str]) -> OutputReader:
    """`form`: of calls, as the chat template teaches it; `names`: of the tools that it was told of."""
    return ContentReader() if form is None or not names else ToolCallReader(form, names)


class MessageReader:
    """An output as a message of a chat, or as its deltas. Ids of calls are drawn here."""

    def __init__(self, reader: OutputReader) -> None:
        self._reader = reader
        self._found = ToolCalls()
        self._ids: list[str] = []
        self.finish_reason = reader.finish_reason

    def read(self, text: str, *, last: bool) -> dict[str, Any]:
        """The fields of a delta that new text makes: content, tool_calls; empty if it makes none yet."""
        deltas = self._reader.read(text, last=last)
        self._found.add(deltas)
        content = "".join(one.text for one in deltas if isinstance(one, TextDelta))
        calls: dict[int, dict[str, Any]] = {}  # by index: of one delta a call has one entry
        for one in deltas:
            if isinstance(one, CallBegun):
                self._ids.append(new_call_id())
                function = {"name": one.name, "arguments": ""}
                calls[one.index] = {"index": one.index, "id": self._ids[-1], "type": "function", "function": function}
            elif isinstance(one, ArgumentsDelta):
                entry = calls.setdefault(one.index, {"index": one.index, "function": {"arguments": ""}})
                entry["function"]["arguments"] += one.text
        delta: dict[str, Any] = {"content": content} if content else {}
        return {**delta, "tool_calls": list(calls.values())} if calls else delta

    def message(self) -> dict[str, Any]:
        """The fields of the whole message, behind the last piece."""
        if not self._found.calls:
            return {"content": self._found.text}
        calls = [
            {"id": identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for identity, call in zip(self._ids, self._found.calls, strict=True)
        ]
        return {"content": self._found.text or None, "tool_calls": calls}


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"
