"""Logits processors, in the one order that applies everywhere: allowed_token_ids, bad_words, min_tokens, logit_bias,
repetition, presence, frequency, temperature, min_p, top_k, top_p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.want import Draw

Row = NDArray[np.float32]


def changes_logits(draw: Draw, num_output_tokens: int) -> bool:
    """Whether `process` would do anything: if not, the row need not be copied."""
    params = draw.params
    return bool(
        params.allowed_token_ids
        or draw.bad_words
        or params.logit_bias
        or params.has_penalties
        or (num_output_tokens < params.min_tokens and draw.end_token_ids)
    )


def process(row: Row, draw: Draw, token_ids: Sequence[int], position: int) -> None:
    """Apply everything before the temperature, in place. `row` [vocab] follows the token at `position`."""
    params = draw.params
    if params.allowed_token_ids is not None:
        kept = list(params.allowed_token_ids)
        values = row[kept]
        row.fill(-np.inf)
        row[kept] = values
    num_output = position + 1 - draw.num_prompt_tokens
    for word in draw.bad_words:
        before = len(word) - 1
        if before <= num_output and tuple(token_ids[position + 1 - before : position + 1]) == word[:-1]:
            row[word[-1]] = -np.inf
    if num_output < params.min_tokens and draw.end_token_ids:
        row[list(draw.end_token_ids)] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += np.float32(bias)
    if draw.counts is not None:
        _penalise(row, draw)


def _penalise(row: Row, draw: Draw) -> None:
    params, counts = draw.params, draw.counts
    if counts is None:
        return
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(counts.prompt | counts.output.keys(), np.int64)
        values = row[seen]
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counts.output and (params.presence_penalty or params.frequency_penalty):
        generated = np.fromiter(counts.output.keys(), np.int64)
        times = np.fromiter(counts.output.values(), np.float32)
        row[generated] -= np.float32(params.presence_penalty)
        row[generated] -= np.float32(params.frequency_penalty) * times


def surviving(row: Row, draw: Draw) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids that can be drawn, ascending, and their logits over the temperature, relative to the best (float64)."""
    params = draw.params
    token_ids = np.flatnonzero(row > -np.inf)
    logits = row[token_ids].astype(np.float64)
    logits -= logits.max()
    logits /= params.temperature
    if params.min_p > 0.0:
        kept = logits >= np.log(params.min_p)
        token_ids, logits = token_ids[kept], logits[kept]
    if 0 < params.top_k < len(token_ids):
        token_ids, logits = _take(token_ids, logits, best(logits, params.top_k))
    if params.top_p < 1.0:
        order = np.argsort(-logits, kind="stable")  # stable: of equals the lower id comes first
        probabilities = np.exp(logits[order])
        before = np.cumsum(probabilities) - probabilities
        kept_count = int(np.count_nonzero(before < params.top_p * probabilities.sum()))
        token_ids, logits = _take(token_ids, logits, order[: max(kept_count, 1)])
    return token_ids, logits


def _take(
    token_ids: NDArray[np.int64], logits: NDArray[np.float64], chosen: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    chosen = np.sort(chosen)
    return token_ids[chosen], logits[chosen]


def best(values: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Indices of the k greatest, greatest first; of equals the lower index first. k is at most len(values)."""
    if k < len(values):
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        above = np.flatnonzero(values > threshold)
        ties = np.flatnonzero(values == threshold)[: k - len(above)]
        chosen = np.concatenate([above, ties])
        chosen.sort()
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
