"""What the sampler needs of a row of logits, in NumPy. Ties go to the lower id; no method changes the row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.sampling.noise import gumbel

Row = NDArray[np.float32]


def log_softmax(row: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural log-probabilities, float64 [vocab]."""
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())


class NumpyRows:
    """Rows are float32 [vocab]; sums and noise are float64."""

    def greatest(self, row: Row) -> tuple[int, float]:
        """Index and value of the greatest; the value is NaN if any is."""
        value = float(row.max())
        return int(row.argmax()), value

    def log_sum_exp(self, row: Row) -> float:
        """Natural logarithm of the sum of the exponentials; what turns a logit into a log-probability."""
        top = float(row.max())
        return top + float(np.log(np.exp(row.astype(np.float64) - top).sum()))

    def log_softmax(self, row: Row) -> Row:
        """Natural log-probabilities, rounded to float32."""
        return log_softmax(row).astype(np.float32)

    def best(self, row: NDArray[np.floating], k: int) -> NDArray[np.intp]:
        """Indices of the k greatest, greatest first. k is at most len(row)."""
        if k < len(row):
            threshold = np.partition(row, len(row) - k)[len(row) - k]
            above = np.flatnonzero(row > threshold)
            ties = np.flatnonzero(row == threshold)[: k - len(above)]
            chosen = np.concatenate([above, ties])
            chosen.sort()
        else:
            chosen = np.arange(len(row))
        return chosen[np.argsort(-row[chosen], kind="stable")]

    def rank(self, row: Row, index: int) -> int:
        """How many values stand before this one, plus 1."""
        higher = int(np.count_nonzero(row > row[index]))
        return 1 + higher + int(np.count_nonzero(row[:index] == row[index]))

    def draw(
        self,
        row: Row,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        stream: tuple[int, ...],
        position: int,
    ) -> int:
        """Draw from what min_p, top_k (0: off) and top_p leave, in this order, of softmax(row / temperature).

        Gumbel-max with the noise of (seed, stream, position, token). The row's greatest value is finite.
        """
        token_ids, logits = self.surviving(row, temperature, top_k, top_p, min_p)
        if len(token_ids) == 1:
            return int(token_ids[0])
        return int(token_ids[np.argmax(logits + gumbel(seed, stream, position, token_ids))])

    def surviving(
        self, row: Row, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Token ids that can be drawn, ascending, and their logits over the temperature, relative to the best."""
        token_ids = np.flatnonzero(row > -np.inf)
        logits = row[token_ids].astype(np.float64)
        logits -= logits.max()
        logits /= temperature
        if min_p > 0.0:
            kept = logits >= np.log(min_p)
            token_ids, logits = token_ids[kept], logits[kept]
        if 0 < top_k < len(token_ids):
            token_ids, logits = _take(token_ids, logits, self.best(logits, top_k))
        if top_p < 1.0:
            order = np.argsort(-logits, kind="stable")  # stable: of equals the lower id comes first
            probabilities = np.exp(logits[order])
            before = np.cumsum(probabilities) - probabilities
            kept_count = int(np.count_nonzero(before < top_p * probabilities.sum()))
            token_ids, logits = _take(token_ids, logits, order[: max(kept_count, 1)])
        return token_ids, logits


def _take(
    token_ids: NDArray[np.int64], logits: NDArray[np.float64], chosen: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    chosen = np.sort(chosen)
    return token_ids[chosen], logits[chosen]
