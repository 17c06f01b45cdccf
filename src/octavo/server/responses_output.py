"""Answers of /v1/responses: a response object, or the typed events that it comes in."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from octavo.core.outputs import CompletionOutput, RequestOutput
from octavo.server.answers import UsageCount
from octavo.server.blocks import Block, Blocks, Change
from octavo.server.chat_output import OutputReader, new_call_id
from octavo.server.errors import ApiError
from octavo.server.generation import Generation, Piece
from octavo.server.logprobs import chat_logprobs
from octavo.server.streams import event

_FAILED = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # by status, of OpenAI's codes; others: server_error
_ENDED = {  # by the finish reason of chats: the status, and why it is incomplete
    "stop": ("completed", None),
    "tool_calls": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
}


@dataclass(frozen=True, slots=True)
class Told:
    """What is told beside the text."""

    top_logprobs: int | None = None  # so many best ones with each token's log-probability; None: none at all
    token_ids: bool = False


class ResponseWriter:
    """One answer, as a whole or piece by piece. `head`: fields of the response that are the request's."""

    def __init__(self, work: Generation, head: dict[str, Any], reader: OutputReader, told: Told) -> None:
        self._work = work
        self._told = told
        self._head = {"id": work.id, "object": "response", "created_at": int(time.time()), **head}
        self._blocks = Blocks(reader)
        self._ids: list[tuple[str, str]] = []  # of each block: the item's, and that of its call
        self._logprobs: list[dict[str, Any]] = []
        self._untold = 0  # of these, how many no event has told yet
        self._token_ids: list[int] = []
        self._usage = UsageCount(work.num_prompt_tokens)
        self._status = "in_progress"
        self._incomplete: str | None = None  # why it is
        self._sequence = 0

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        self._take(list(enumerate(outputs)))
        return self._response()

    # --- as events ---

    def chunks(self, pieces: list[Piece]) -> bytes:
        begun = b"" if self._sequence else self._lifecycle("response.created", "response.in_progress")
        return begun + b"".join(self._changed(change) for change in self._take(pieces))

    def last(self) -> bytes:
        return self._lifecycle(f"response.{self._status}")

    def failed(self, error: ApiError) -> bytes:
        """The stream ends with this instead."""
        self._status = "failed"
        told = {"code": _FAILED.get(error.status, "server_error"), "message": error.message}
        return self._event("response.failed", response={**self._response(), "error": told})

    def _lifecycle(self, *kinds: str) -> bytes:
        return b"".join(self._event(kind, response=self._response()) for kind in kinds)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence - 1, **fields}, kind)

    def _changed(self, change: Change) -> bytes:
        what, block, added = change
        tell = self._call_changed if block.name is not None else self._text_changed
        return tell(what, block, added)

    def _text_changed(self, what: str, block: Block, added: str) -> bytes:
        at = {"output_index": block.index, "item_id": self._ids[block.index][0]}
        part = {**at, "content_index": 0}
        if what == "begun":
            item = {**self._item(block), "status": "in_progress", "content": []}
            opened = self._event("response.output_item.added", output_index=block.index, item=item)
            return opened + self._event("response.content_part.added", **part, part=_part("", []))
        if what == "added":
            return self._event("response.output_text.delta", **part, delta=added, logprobs=self._new_logprobs())
        item = self._item(block)
        (whole,) = item["content"]
        late = b""
        if self._untold < len(self._logprobs):  # of tokens without text, such as the end
            late = self._event("response.output_text.delta", **part, delta="", logprobs=self._new_logprobs())
        return (
            late
            + self._event("response.output_text.done", **part, text=whole["text"], logprobs=whole["logprobs"])
            + self._event("response.content_part.done", **part, part=whole)
            + self._event("response.output_item.done", output_index=block.index, item=item)
        )

    def _call_changed(self, what: str, block: Block, added: str) -> bytes:
        at = {"output_index": block.index, "item_id": self._ids[block.index][0]}
        if what == "begun":
            item = {**self._item(block), "status": "in_progress", "arguments": ""}
            return self._event("response.output_item.added", output_index=block.index, item=item)
        if what == "added":
            return self._event("response.function_call_arguments.delta", **at, delta=added)
        done = self._event("response.function_call_arguments.done", **at, name=block.name, arguments=block.text)
        return done + self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def _new_logprobs(self) -> list[dict[str, Any]]:
        new, self._untold = self._logprobs[self._untold :], len(self._logprobs)
        return new

    # --- what there is ---

    def _take(self, pieces: list[Piece]) -> list[Change]:
        """What pieces change."""
        self._usage.note(pieces)
        changes: list[Change] = []
        for _, output in pieces:
            for one in output.outputs:
                changes += self._take_one(one)
        return changes

    def _take_one(self, one: CompletionOutput) -> list[Change]:
        self._token_ids += one.token_ids
        if self._told.top_logprobs is not None and one.logprobs is not None:
            self._logprobs += chat_logprobs(one.token_ids, one.logprobs, self._told.top_logprobs)["content"]
        changes = self._blocks.read(one.text, one.finish_reason)
        self._ids += [(_item_id(block), new_call_id()) for block in self._blocks.all[len(self._ids) :]]
        reason = self._blocks.finish_reason
        if reason is not None:
            self._status, self._incomplete = _ENDED.get(reason, ("incomplete", reason))
        return changes

    def _response(self) -> dict[str, Any]:
        ended = self._status not in ("in_progress", "failed")
        response = {
            **self._head,
            "status": self._status,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": None,
            "incomplete_details": None if self._incomplete is None else {"reason": self._incomplete},
            "output": [self._item(block) for block in self._blocks.all],
            "usage": self._usage_so_far() if ended else None,
        }
        if ended and self._told.token_ids:
            response["prompt_token_ids"] = self._work.prompts[0].token_ids
            response["token_ids"] = self._token_ids
        return response

    def _usage_so_far(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _item(self, block: Block) -> dict[str, Any]:
        identity, call_id = self._ids[block.index]
        last = block is self._blocks.all[-1]
        if not block.ended:
            status = "in_progress"
        elif block.cut or (last and block.name is None and self._status == "incomplete"):
            status = "incomplete"
        else:
            status = "completed"
        if block.name is not None:
            call = {"arguments": block.text, "call_id": call_id, "name": block.name}
            return {"id": identity, "type": "function_call", "status": status, **call}
        content = [_part(block.text, self._logprobs)]
        return {"id": identity, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _item_id(block: Block) -> str:
    return f"{'msg' if block.name is None else 'fc'}_{secrets.token_hex(12)}"
