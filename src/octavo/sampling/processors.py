"""Logits processors, in the one order that applies everywhere: structured_outputs, allowed_token_ids, bad_words,
min_tokens, logit_bias, repetition, presence, frequency, no_repeat_ngram_size. In a draw then: temperature, min_p,
top_k, top_p (rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.params import SamplingParams
from octavo.core.want import Counts, Draw

Row = NDArray[np.float32]


def changes_logits(draw: Draw) -> bool:
    """Whether `process` would do anything: if not, the row need not be copied."""
    return bool(draw.history is not None or draw.params.allowed_token_ids or draw.params.logit_bias)


def process(row: Row, draw: Draw) -> None:
    """Apply everything before the temperature, in place. `row` [vocab] follows the tokens of the draw's history."""
    params, history = draw.params, draw.history
    if history is not None and history.mask is not None:
        _keep(row, history.mask.bits())
    if params.allowed_token_ids is not None:
        kept = list(params.allowed_token_ids)
        values = row[kept]
        row.fill(-np.inf)
        row[kept] = values
    if history is not None and history.forbidden:
        row[list(history.forbidden)] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += np.float32(bias)
    if history is not None and history.counts is not None:
        _penalise(row, params, history.counts)
    if history is not None and draw.no_repeat_ngram_size:
        row[_completions(history.token_ids, draw.no_repeat_ngram_size)] = -np.inf


def _keep(row: Row, mask: bytes) -> None:
    """What the mask has a bit for, the lowest of a byte first."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(row), bitorder="little")  # padded with 0
    row[bits == 0] = -np.inf


def _completions(token_ids: Sequence[int], size: int) -> NDArray[np.intp]:
    """Tokens that followed earlier occurrences of the last size - 1 tokens."""
    seen = np.asarray(token_ids, np.int64)
    if len(seen) < size:
        return np.empty(0, np.intp)
    matches = np.ones(len(seen) - size + 1, np.bool_)
    for offset in range(size - 1):
        matches &= seen[offset : offset + len(matches)] == seen[len(seen) - size + 1 + offset]
    return seen[size - 1 :][matches]


def _penalise(row: Row, params: SamplingParams, counts: Counts) -> None:
    output = dict(counts.output)
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(counts.prompt | output.keys(), np.int64)
        values = row[seen]
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        generated = np.fromiter(output.keys(), np.int64)
        times = np.fromiter(output.values(), np.float32)
        row[generated] -= np.float32(params.presence_penalty)
        row[generated] -= np.float32(params.frequency_penalty) * times
