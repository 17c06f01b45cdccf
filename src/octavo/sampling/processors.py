"""Logits processors, in the one order that applies everywhere: allowed_token_ids, bad_words, min_tokens, logit_bias,
repetition, presence, frequency, no_repeat_ngram_size. In a draw then: temperature, min_p, top_k, top_p (ops.rows).
"""

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
        or draw.no_repeat_ngram_size
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
    if draw.no_repeat_ngram_size:
        row[_completions(token_ids[: position + 1], draw.no_repeat_ngram_size)] = -np.inf


def _completions(token_ids: Sequence[int], size: int) -> NDArray[np.intp]:
    """Tokens that followed earlier occurrences of the last size - 1 tokens."""
    seen = np.asarray(token_ids, np.int64)
    if len(seen) < size:
        return np.empty(0, np.intp)
    matches = np.ones(len(seen) - size + 1, np.bool_)
    for offset in range(size - 1):
        matches &= seen[offset : offset + len(matches)] == seen[len(seen) - size + 1 + offset]
    return seen[size - 1 :][matches]


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
