"""The sampler in NumPy: what the wants ask of rows of logits. The oracle of every backend's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import DrawResult, RowResult, TokenLogprob, TokenLogprobs
from octavo.core.want import Draw, NextLogprobs, Sample, Score, TopK, Want
from octavo.ops.rows import RowRequest, SamplingError, damaged_row, nothing_left
from octavo.sampling.processors import changes_logits, process
from octavo.sampling.rows import NumpyRows

Row = NDArray[np.float32]


class Sampler:
    """Stateless; rows are float32 [vocab], as the model's head gave them, and are not changed."""

    def __init__(self) -> None:
        self._rows = NumpyRows()

    def sample(self, logits: NDArray[np.float32], requests: Sequence[RowRequest]) -> list[RowResult | SamplingError]:
        """Answer what is asked of rows of logits [R, vocab]. A row that cannot be sampled fails by itself."""
        results: list[RowResult | SamplingError] = []
        for request in requests:
            try:
                results.append(self.run(logits[request.row], request.want, request.position))
            except SamplingError as error:
                results.append(error)
        return results

    def run(self, row: Row, want: Want, position: int) -> RowResult:
        """Answer one want of the row at a position. Raises SamplingError."""
        best = self._check(row)
        match want:
            case Sample():
                return RowResult(position, draws=tuple(self._draw(row, best, draw, position) for draw in want.draws))
            case TopK():
                return self._top_k(row, want, position)
            case Score():
                return RowResult(position, scores=self._score(row, want))
            case NextLogprobs():
                return RowResult(position, logprobs=self._logprobs(row, want.token_ids, want.top)[0])
        raise TypeError(f"{want!r} is not wanted of logits")

    def _logprobs(self, row: Row, token_ids: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
        """Log-probability and rank of each token, and the `top` best. Of the raw logits."""
        normalizer = self._rows.log_sum_exp(row)

        def entry(token_id: int, rank: int) -> TokenLogprob:
            return TokenLogprob(token_id, float(row[token_id]) - normalizer, rank)

        chosen = self._rows.best(row, min(top, len(row))) if top else ()
        alternatives = tuple(entry(int(token_id), rank) for rank, token_id in enumerate(chosen, 1))
        # The rank is counted on the logits: two of them may round to one log-probability.
        return tuple(TokenLogprobs(entry(i, self._rows.rank(row, i)), alternatives) for i in token_ids)

    def _check(self, row: Row) -> int:
        """Index of the best token. Raise SamplingError unless its logit is finite, and no other is NaN or +inf."""
        best, highest = self._rows.greatest(row)
        if not math.isfinite(highest):
            raise damaged_row(highest)
        return best

    def _draw(self, row: Row, best: int, draw: Draw, position: int) -> DrawResult:
        params = draw.params
        processed = row
        if changes_logits(draw):
            processed = row.copy()
            process(processed, draw)
            best, highest = self._rows.greatest(processed)
            if not math.isfinite(highest):
                raise nothing_left(Sample((draw,)))
        chosen = best
        if not params.greedy:
            chosen = self._rows.draw(
                processed,
                temperature=params.temperature,
                top_k=max(params.top_k, 0),
                top_p=params.top_p,
                min_p=params.min_p,
                seed=draw.seed,
                stream=draw.stream,
                position=position + 1,
            )
        logprobs = None if params.logprobs is None else self._logprobs(row, (chosen,), params.logprobs)[0]
        return DrawResult(chosen, logprobs)

    def _top_k(self, row: Row, want: TopK, position: int) -> RowResult:
        values = self._rows.log_softmax(row)
        if changes_logits(want.draw):
            process(values, want.draw)
        chosen = [int(i) for i in self._rows.best(values, min(want.k, len(values)))]
        return RowResult(
            position,
            candidates=tuple((i, float(values[i])) for i in chosen),
            candidate_logprobs=() if want.logprobs is None else self._logprobs(row, chosen, want.logprobs),
        )

    def _score(self, row: Row, want: Score) -> tuple[float, ...]:
        normalizer = self._rows.log_sum_exp(row)
        return tuple(float(np.logaddexp.reduce(row[list(ids)].astype(np.float64))) - normalizer for ids in want.sets)
