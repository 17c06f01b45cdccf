"""Answers of /v1/messages: a message object, or the typed events that it comes in."""

from __future__ import annotations

import json
import secrets
from typing import Any

from pydantic_core import from_json
from starlette.types import Scope

from octavo.core.outputs import CompletionOutput, RequestOutput
from octavo.server.answers import UsageCount
from octavo.server.blocks import Block, Blocks, Change
from octavo.server.chat_output import OutputReader
from octavo.server.envelope import error_body
from octavo.server.errors import ApiError
from octavo.server.generation import Generation, Piece
from octavo.server.streams import event

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


class MessageWriter:
    """One answer, as a whole or piece by piece. `scope` is the request's, for errors."""

    def __init__(self, work: Generation, model: str, reader: OutputReader, scope: Scope) -> None:
        self._work = work
        self._model = model
        self._scope = scope
        self._blocks = Blocks(reader)
        self._ids: list[str] = []  # of each block that is a call
        self._usage = UsageCount(work.num_prompt_tokens)
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._begun = False

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        self._take(list(enumerate(outputs)))
        return self._message([self._content(block) for block in self._blocks.all])

    # --- as events ---

    def chunks(self, pieces: list[Piece]) -> bytes:
        changes = self._take(pieces)
        if not self._begun:
            self._begun = True
            begun = _event("message_start", message={**self._message([]), "stop_reason": None, "stop_sequence": None})
        else:
            begun = b"" if pieces else _event("ping")
        return begun + b"".join(self._changed(change) for change in changes)

    def last(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return _event("message_delta", delta=delta, usage=self._usage_so_far()) + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """The stream ends with this instead."""
        return event(error_body(error, self._scope), "error")

    def _changed(self, change: Change) -> bytes:
        what, block, added = change
        if what == "begun":
            empty = self._content(Block(block.index, block.name))
            return _event("content_block_start", index=block.index, content_block=empty)
        if what == "ended":
            return _event("content_block_stop", index=block.index)
        if block.name is None:
            delta = {"type": "text_delta", "text": added}
        else:
            delta = {"type": "input_json_delta", "partial_json": added}
        return _event("content_block_delta", index=block.index, delta=delta)

    # --- what there is ---

    def _take(self, pieces: list[Piece]) -> list[Change]:
        """What pieces change."""
        self._usage.note(pieces)
        changes: list[Change] = []
        for _, output in pieces:
            for one in output.outputs:
                changes += self._blocks.read(one.text, one.finish_reason)
                self._end(one)
        self._ids += [f"toolu_{secrets.token_hex(12)}" for _ in self._blocks.all[len(self._ids) :]]
        return changes

    def _end(self, one: CompletionOutput) -> None:
        reason = self._blocks.finish_reason
        if reason is None:
            return
        self._stop_reason = _STOP_REASONS.get(reason, reason)
        if reason == "stop" and isinstance(one.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", one.stop_reason
        elif reason == "length" and self._usage.completion_tokens < (self._work.params.max_tokens or 0):
            self._stop_reason = "model_context_window_exceeded"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._work.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage_so_far(),
        }

    def _usage_so_far(self) -> dict[str, Any]:
        """As Anthropic counts: the prompt is what was computed and what was cached, together."""
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }

    def _content(self, block: Block) -> dict[str, Any]:
        if block.name is None:
            return {"type": "text", "text": block.text}
        given = input_of(block.text, block.cut)
        return {"type": "tool_use", "id": self._ids[block.index], "name": block.name, "input": given}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def input_of(arguments: str, cut: bool = False) -> dict[str, Any]:
    """Arguments as the object that Anthropic has. Of such that the answer's end has cut it is what there is; of such
    that are none it holds the text, under the name that Anthropic recommends for that."""
    if not arguments:
        return {}
    try:
        found = from_json(arguments, allow_inf_nan=False, allow_partial=cut)
        json.dumps(found, allow_nan=False)  # 1e999 is read as infinite, which could not be told
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}
