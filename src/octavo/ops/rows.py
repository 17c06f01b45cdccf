"""What is asked of rows of logits, and why one cannot be answered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo.core.want import Want


class RowRequest(NamedTuple):
    """Something wanted of one row of logits."""

    row: int
    position: int  # of the row in its sequence: a draw from it is the token at the next one
    want: Want  # Sample, TopK, Score, or NextLogprobs of one token


class SamplingError(ValueError):
    """A row cannot be sampled; only the request it belongs to ends."""


def damaged_row(greatest: float) -> SamplingError:
    """Of a row whose greatest value is not finite; NaN if any is."""
    kind = "NaN" if math.isnan(greatest) else ("+inf" if greatest > 0 else "nothing but -inf")
    return SamplingError(f"the model's logits contain {kind}: its weights may be damaged")


def nothing_left(want: Want) -> SamplingError:
    """Of a draw whose processors leave no token."""
    for draw in getattr(want, "draws", ()):
        mask = None if draw.history is None else draw.history.mask
        if mask is not None and mask.error is not None:
            return SamplingError(f"structured_outputs: {mask.error}")
    return SamplingError(
        "no token can be drawn: the request's structured_outputs, allowed_token_ids, bad_words, min_tokens and "
        "logit_bias together rule out the whole vocabulary"
    )
