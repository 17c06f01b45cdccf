"""Events of Writing in the Margins and of questions over documents as JSON, each with its type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response

from octavo.ask import AskDone, AskResult
from octavo.core.ask import DocumentEvent
from octavo.core.margins import AnswerDelta
from octavo.core.outputs import CompletionOutput, RequestMetrics, joined_outputs
from octavo.margins import MarginsAnswer, MarginsDone, MarginsResult
from octavo.server.answers import Work, stream, usage
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError, JSONBytes
from octavo.server.logprobs import plain_logprobs
from octavo.server.streams import event

_CAPITAL = re.compile(r"(?<!^)([A-Z])")


async def typed_answer(
    context: ServerContext,
    head: dict[str, Any],
    work: Work,
    result_json: Callable[[Any], dict[str, Any]],
    *,
    streams: bool,
    begun: bytes = b"",
) -> Response:
    """What a run gives: its result, or a stream of events with types, of which the last is ``done`` or ``error``."""
    if not streams:
        told: list[Any] = []
        await work(told.append)
        return JSONBytes({**head, **result_json(told[-1].result)})
    opening = [begun]

    def written(piece: Any) -> bytes:
        if isinstance(piece, MarginsDone | AskDone):
            return event({"type": "done", **head, "result": result_json(piece.result)}, "done")
        return event(as_json(piece), type_of(piece))

    def write(pieces: list[Any]) -> bytes:
        parts = opening + [written(piece) for piece in pieces]
        opening.clear()
        return b"".join(parts)

    def failed(error: ApiError) -> bytes:
        return event({"type": "error", **error.body}, "error")

    return await stream(context, work, merged_events, write, lambda: b"", failed)


def type_of(told: Any) -> str:
    """``MarginWritten`` -> ``margin_written``"""
    return _CAPITAL.sub(r"_\1", type(told).__name__).lower()


def as_json(told: Any) -> dict[str, Any]:
    """An event of either kind, but for the last."""
    kind = type_of(told)
    if isinstance(told, AnswerDelta):
        return {"type": kind, "question": told.question, "output": output_json(told.output)}
    if isinstance(told, DocumentEvent):
        return {"type": kind, "document": told.document, "event": as_json(told.event)}
    return {"type": kind, **msgspec.to_builtins(told)}


def output_json(output: CompletionOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "logprobs": plain_logprobs(output.logprobs),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def margins_json(result: MarginsResult) -> dict[str, Any]:
    """What reading a document has given."""
    read = result.segments[-1].last_token
    return {
        "seed": result.seed,
        "system_fingerprint": result.system_fingerprint,
        "segments": msgspec.to_builtins(result.segments),
        "answers": [_answer_json(one) for one in result.answers],
        "usage": _usage(read, result.metrics),
    }


def _answer_json(answer: MarginsAnswer) -> dict[str, Any]:
    return {
        "question": answer.question,
        **output_json(answer.output),
        "margins": msgspec.to_builtins(answer.margins),
        "num_segments": answer.num_segments,
        "num_prompt_tokens": len(answer.prompt_token_ids),
    }


def ask_json(result: AskResult) -> dict[str, Any]:
    """What a question over documents has given."""
    return {
        "question": result.question,
        **output_json(result.output),
        "sources": msgspec.to_builtins(result.sources),
        "citations": msgspec.to_builtins(result.citations),
        "passages": msgspec.to_builtins(result.passages),
        "num_left_out": result.num_left_out,
        "readings": [{"document": name, **margins_json(one)} for name, one in result.readings],
        "seed": result.seed,
        "system_fingerprint": result.system_fingerprint,
        "usage": _usage(len(result.prompt_token_ids), result.metrics),
    }


def _usage(prompt_tokens: int, metrics: RequestMetrics) -> dict[str, Any]:
    return usage(prompt_tokens, metrics.num_generated_tokens, metrics.num_cached_tokens)


def merged_events(earlier: Any, new: Any) -> Any | None:
    """Two pieces of one answer as one; other events stay apart: there are as many as the document has segments."""
    if isinstance(earlier, AnswerDelta) and isinstance(new, AnswerDelta) and earlier.question == new.question:
        return replace(new, output=joined_outputs(earlier.output, new.output))
    return None
