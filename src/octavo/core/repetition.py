"""Whether an output repeats itself, token for token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.core.params import RepetitionDetectionParams


def repeats(token_ids: list[int], params: RepetitionDetectionParams) -> bool:
    """Whether `token_ids` ends with one pattern `min_count` times in a row, of a size that `params` allows.

    A function of the tokens alone: nothing is remembered that a fork, a preemption or a truncation would have to keep
    in step. It is asked after every token, and what takes time is comparing lists, not interpreting: the last token is
    looked for where a pattern would have had it, and only from there on whole stretches are compared.
    """
    end, count = len(token_ids), params.min_count
    if not params.max_pattern_size:
        return False
    least, most = max(params.min_pattern_size, 1), min(params.max_pattern_size, end // count)
    if most < least:
        return False
    at, stop = end - 1 - most, end - least  # where the last token stands one pattern earlier
    while True:
        try:
            at = token_ids.index(token_ids[-1], at, stop)
        except ValueError:
            return False
        size = end - 1 - at
        start = end - size * count
        if token_ids[start] == token_ids[start + size] and token_ids[start : end - size] == token_ids[start + size :]:
            return True
        at += 1
