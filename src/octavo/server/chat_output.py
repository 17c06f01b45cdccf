"""From the text of an answer to a message: content, and calls of tools. A reader of something else in it, such as
reasoning, is another `MessageReader`, made in `reader_for`."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from octavo.text.tool_calls import ArgumentsDelta, CallBegun, TextDelta, ToolCallParser, ToolCalls


class MessageReader(Protocol):
    """Reads one output, piece by piece."""

    def read(self, text: str, *, last: bool) -> dict[str, Any]:
        """The fields of a delta that new text makes: content, tool_calls; empty if it makes none yet."""
        ...

    def message(self) -> dict[str, Any]:
        """The fields of the whole message, behind the last piece."""
        ...

    def finish_reason(self, reason: str | None) -> str | None:
        """What the answer ends with, of what the engine says."""
        ...


class ContentReader:
    """All text is content."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def read(self, text: str, *, last: bool) -> dict[str, Any]:
        del last
        self._parts.append(text)
        return {"content": text} if text else {}

    def message(self) -> dict[str, Any]:
        return {"content": "".join(self._parts)}

    def finish_reason(self, reason: str | None) -> str | None:
        return reason


class ToolCallReader:
    """Text in which calls of tools may stand; see octavo.text.tool_calls. Their ids are drawn here."""

    def __init__(self, form: str, names: list[str]) -> None:
        self._parser = ToolCallParser(form, names)
        self._found = ToolCalls()
        self._ids: list[str] = []

    def read(self, text: str, *, last: bool) -> dict[str, Any]:
        deltas = self._parser.feed(text)
        if last:
            deltas += self._parser.finish()
        self._found.add(deltas)
        content = "".join(one.text for one in deltas if isinstance(one, TextDelta))
        calls: dict[int, dict[str, Any]] = {}  # by index: of one delta a call has one entry
        for one in deltas:
            if isinstance(one, CallBegun):
                self._ids.append(f"call_{secrets.token_hex(12)}")
                function = {"name": one.name, "arguments": ""}
                calls[one.index] = {"index": one.index, "id": self._ids[-1], "type": "function", "function": function}
            elif isinstance(one, ArgumentsDelta):
                entry = calls.setdefault(one.index, {"index": one.index, "function": {"arguments": ""}})
                entry["function"]["arguments"] += one.text
        delta: dict[str, Any] = {"content": content} if content else {}
        return {**delta, "tool_calls": list(calls.values())} if calls else delta

    def message(self) -> dict[str, Any]:
        if not self._found.calls:
            return {"content": self._found.text}
        calls = [
            {"id": identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for identity, call in zip(self._ids, self._found.calls, strict=True)
        ]
        return {"content": self._found.text or None, "tool_calls": calls}

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._found.calls else reason


def reader_for(form: str | None, tools: list[dict[str, Any]] | None) -> MessageReader:
    """`form`: of calls, as the chat template teaches it; `tools`: that it was told of."""
    if form is None or not tools:
        return ContentReader()
    return ToolCallReader(form, [tool["function"]["name"] for tool in tools])
