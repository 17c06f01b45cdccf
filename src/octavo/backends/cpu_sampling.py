"""Sampling of the `cpu` backend: requests as the tuples that `_C.sample` takes, and results from those it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo import _C
from octavo.core.plan import DrawResult, RowResult, TokenLogprob, TokenLogprobs
from octavo.core.want import Draw, NextLogprobs, Sample, Score, TopK
from octavo.ops.rows import RowRequest, SamplingError, damaged_row, nothing_left
from octavo.sampling.processors import changes_logits


def sample_rows(
    machine: _C.Machine, logits: NDArray[np.float32], requests: Sequence[RowRequest]
) -> list[RowResult | SamplingError]:
    """Answers of all requests, from logits [R, vocab], in one call."""
    answers = _C.sample(machine, logits, [_asked(request) for request in requests])
    return [_result(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _asked(request: RowRequest) -> _C.RowRequest:
    row, position, want = request
    position += 1  # of what is drawn
    match want:
        case Sample():
            return row, position, "sample", [_draw(draw) for draw in want.draws]
        case TopK():
            return row, position, "top_k", (want.k, want.logprobs, _changes(want.draw))
        case Score():
            return row, position, "score", want.sets
        case NextLogprobs():
            return row, position, "next_logprobs", (want.token_ids[0], want.top)
    raise TypeError(f"{want!r} is not wanted of logits")


def _draw(draw: Draw) -> tuple[Any, ...]:
    params = draw.params
    changes = _changes(draw)
    if params.greedy:  # the best token, whatever the filters and the noise
        return 0.0, 0, 1.0, 0.0, 0, (), params.logprobs, changes
    top_k = max(params.top_k, 0)
    return params.temperature, top_k, params.top_p, params.min_p, draw.seed, draw.stream, params.logprobs, changes


def _changes(draw: Draw) -> tuple[Any, ...] | None:
    if not changes_logits(draw):
        return None
    params, history = draw.params, draw.history
    counts = history.counts if history is not None else None
    return (
        params.allowed_token_ids or (),
        history.forbidden if history is not None else (),
        list(params.logit_bias.items()) if params.logit_bias else (),
        (1.0, 0.0, 0.0)
        if counts is None
        else (params.repetition_penalty, params.presence_penalty, params.frequency_penalty),
        () if counts is None else list(counts.prompt),
        () if counts is None else counts.output,
        history.token_ids if history is not None else (),
        draw.no_repeat_ngram_size if history is not None else 0,
        None if history is None or history.mask is None else history.mask.bits(),
    )


def _result(request: RowRequest, answer: tuple[Any, ...] | float | None) -> RowResult | SamplingError:
    if answer is None:
        return nothing_left(request.want)
    if isinstance(answer, float):
        return damaged_row(answer)
    tokens, values, entries, tops = answer
    position, want = request.position, request.want
    match want:
        case Sample():
            if not entries:
                return RowResult(position, tuple(map(DrawResult, tokens)))
            drawn = zip(want.draws, tokens, entries, tops, strict=True)
            return RowResult(position, tuple(_drawn(*one) for one in drawn))
        case TopK():
            top = _top(tops[0]) if tops else ()
            return RowResult(
                position,
                candidates=tuple(zip(tokens, values, strict=True)),
                candidate_logprobs=tuple(_logprobs(entry, top) for entry in entries),
            )
        case Score():
            return RowResult(position, scores=tuple(values))
    return RowResult(position, logprobs=_logprobs(entries[0], _top(tops[0])))


def _drawn(draw: Draw, token: int, entry: _C.TokenLogprob, top: list[_C.TokenLogprob]) -> DrawResult:
    return DrawResult(token, None if draw.params.logprobs is None else _logprobs(entry, _top(top)))


def _top(entries: list[_C.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(map(TokenLogprob._make, entries))


def _logprobs(entry: _C.TokenLogprob, top: tuple[TokenLogprob, ...]) -> TokenLogprobs:
    return TokenLogprobs(TokenLogprob._make(entry), top)
