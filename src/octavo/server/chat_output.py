"""From the text of an answer to a message: here it becomes content. A reader of tool calls or of reasoning is another
`MessageReader`, made in `reader_for`."""

from __future__ import annotations

from typing import Any, Protocol


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


def reader_for(tools: list[dict[str, Any]] | None) -> MessageReader:
    """`tools`: that the template was told of."""
    del tools
    return ContentReader()
