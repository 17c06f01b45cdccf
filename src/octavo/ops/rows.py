"""What is asked of rows of logits, and what the sampler needs of one, float32 [vocab]. Ties go to the lower id."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.core.want import Want

    Row = NDArray[np.float32]


class RowRequest(NamedTuple):
    """Something wanted of one row of logits."""

    row: int
    position: int  # of the row in its sequence: a draw from it is the token at the next one
    want: Want  # Sample, TopK, Score, or NextLogprobs of one token


class RowOps(Protocol):
    """A backend's own, or octavo.sampling.rows in NumPy. No method changes the row."""

    def greatest(self, row: Row) -> tuple[int, float]:
        """Index and value of the greatest; the value is NaN if any is."""
        ...

    def log_sum_exp(self, row: Row) -> float:
        """Natural logarithm of the sum of the exponentials; what turns a logit into a log-probability."""
        ...

    def log_softmax(self, row: Row) -> Row:
        """Natural log-probabilities, rounded to float32."""
        ...

    def best(self, row: Row, k: int) -> NDArray[np.integer]:
        """Indices of the k greatest, greatest first. k is at most len(row)."""
        ...

    def rank(self, row: Row, index: int) -> int:
        """How many values stand before this one, plus 1."""
        ...

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
        ...
