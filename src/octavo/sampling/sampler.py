"""The sampler: what the wants ask of rows of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import DrawResult, GrantResult, TokenLogprob, TokenLogprobs
from octavo.core.want import Draw, Sample, Score, TopK
from octavo.sampling.noise import gumbel
from octavo.sampling.processors import best, changes_logits, process, surviving

Row = NDArray[np.float32]


class SamplingError(ValueError):
    """A row cannot be sampled; only the request it belongs to ends."""


def check(row: Row) -> None:
    """Raise SamplingError unless the row holds at least one finite logit and neither NaN nor +inf."""
    highest = row.max()  # NaN if any element is
    if not np.isfinite(highest):
        kind = "NaN" if np.isnan(highest) else ("+inf" if highest > 0 else "nothing but -inf")
        raise SamplingError(f"the model's logits contain {kind}: its weights may be damaged")


def log_softmax(row: Row) -> NDArray[np.float64]:
    """Natural log-probabilities, float64 [vocab]."""
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())


class Sampler:
    """Stateless; rows are float32 [vocab], as the model's head gave them, and are not changed."""

    def run(self, row: Row, want: Sample | TopK | Score, token_ids: Sequence[int], position: int) -> GrantResult:
        """Answer one want of the row that follows `token_ids[position]`. Raises SamplingError."""
        check(row)
        if isinstance(want, Sample):
            return GrantResult(draws=tuple(self._draw(row, draw, token_ids, position) for draw in want.draws))
        if isinstance(want, TopK):
            return GrantResult(candidates=self._top_k(row, want, token_ids, position))
        return GrantResult(scores=self._score(row, want))

    def logprobs(self, row: Row, token_id: int, top: int) -> TokenLogprobs:
        """Log-probability and rank of one token, and the `top` best. Of the raw logits."""
        check(row)
        values = log_softmax(row)

        def entry(index: int) -> TokenLogprob:
            # The rank is counted on the logits: two of them may round to one log-probability.
            higher = int(np.count_nonzero(row > row[index]))
            return TokenLogprob(
                index, float(values[index]), 1 + higher + int(np.count_nonzero(row[:index] == row[index]))
            )

        chosen = best(row, min(top, len(row))) if top else ()
        alternatives = tuple(TokenLogprob(int(i), float(values[i]), rank) for rank, i in enumerate(chosen, 1))
        return TokenLogprobs(entry(token_id), alternatives)

    def _draw(self, row: Row, draw: Draw, token_ids: Sequence[int], position: int) -> DrawResult:
        params = draw.params
        processed = row
        if changes_logits(draw, position + 1 - draw.num_prompt_tokens):
            processed = row.copy()
            process(processed, draw, token_ids, position)
            if not np.isfinite(processed.max()):
                raise SamplingError(
                    "no token can be drawn: the request's allowed_token_ids, bad_words, min_tokens and "
                    "logit_bias together rule out the whole vocabulary"
                )
        if params.greedy:
            chosen = int(processed.argmax())  # of equals the lower id
        else:
            ids, logits = surviving(processed, draw)
            chosen = int(ids[0])
            if len(ids) > 1:
                chosen = int(ids[np.argmax(logits + gumbel(draw.seed, draw.stream, position + 1, ids))])
        logprobs = None if params.logprobs is None else self.logprobs(row, chosen, params.logprobs)
        return DrawResult(chosen, logprobs)

    def _top_k(self, row: Row, want: TopK, token_ids: Sequence[int], position: int) -> tuple[tuple[int, float], ...]:
        values = log_softmax(row).astype(np.float32)
        if changes_logits(want.draw, position + 1 - want.draw.num_prompt_tokens):
            process(values, want.draw, token_ids, position)
        chosen = best(values, min(want.k, len(values)))
        return tuple((int(i), float(values[i])) for i in chosen)

    def _score(self, row: Row, want: Score) -> tuple[float, ...]:
        values = log_softmax(row)
        return tuple(float(np.logaddexp.reduce(values[list(ids)])) for ids in want.sets)
