"""An answer as a row of blocks, texts and calls of tools, in the order in which they stand in it: what the routes with
typed events tell. Whole answers are read here as well, as one piece, so that both are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.server.chat_output import OutputReader
from octavo.text.tool_calls import ArgumentsDelta, CallBegun, TextDelta


@dataclass(slots=True)
class Block:
    index: int  # in the answer, from 0
    name: str | None = None  # of the tool that is called; None: it is text
    text: str = ""  # so far; of a call its arguments, JSON
    ended: bool = False
    cut: bool = False  # of a call: the answer ended before its arguments did


Change = tuple[Literal["begun", "added", "ended"], Block, str]  # the last: what was added


class Blocks:
    """Of one output, which has one block at least, if only of no text."""

    def __init__(self, reader: OutputReader) -> None:
        self._reader = reader
        self.all: list[Block] = []
        self.finish_reason: str | None = None  # as chats have it, behind the last piece

    def read(self, text: str, reason: str | None) -> list[Change]:
        """What a piece changes; `reason` is the engine's for its end, with the last one."""
        changes: list[Change] = []
        for delta in self._reader.read(text, last=reason is not None):
            if isinstance(delta, TextDelta):
                self._add(self._text_block(changes), delta.text, changes)
            elif isinstance(delta, CallBegun):
                self._begin(delta.name, changes)
            elif isinstance(delta, ArgumentsDelta):
                self._add(self.all[-1], delta.text, changes)
            else:
                self._end(changes)
        if reason is not None:
            self.finish_reason = self._reader.finish_reason(reason)
            if not self.all:
                self._begin(None, changes)
            self.all[-1].cut = self.all[-1].name is not None and not self.all[-1].ended
            self._end(changes)
        return changes

    def _text_block(self, changes: list[Change]) -> Block:
        if not self.all or self.all[-1].ended:
            self._begin(None, changes)
        return self.all[-1]

    def _begin(self, name: str | None, changes: list[Change]) -> None:
        self._end(changes)
        self.all.append(Block(len(self.all), name))
        changes.append(("begun", self.all[-1], ""))

    @staticmethod
    def _add(block: Block, text: str, changes: list[Change]) -> None:
        block.text += text
        changes.append(("added", block, text))

    def _end(self, changes: list[Change]) -> None:
        if self.all and not self.all[-1].ended:
            self.all[-1].ended = True
            changes.append(("ended", self.all[-1], ""))
