"""The rule by which two computations of the same rows of logits count as equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.oracle.oracle import Answer

Rows = NDArray[np.floating]

LOGITS_TOLERANCE = 1e-4  # of the row's greatest |logit|


@dataclass
class Tally:
    """What several comparisons found."""

    worst: float = 0.0  # greatest |difference of logits|, as a share of the row's greatest |logit|
    tokens: int = 0  # chosen tokens that were compared
    excused: list[str] = field(default_factory=list)

    def rows(self, ours: Rows, theirs: Rows, tolerance: float = LOGITS_TOLERANCE) -> None:
        """Every row [R, vocab] agrees within the tolerance."""
        assert ours.shape == theirs.shape
        assert np.isfinite(ours).all()
        shares = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
        self.worst = max(self.worst, float(shares.max()))
        row = int(shares.argmax())
        assert shares[row] <= tolerance, f"row {row} of {len(shares)} is off by {shares[row]:.2e} of its greatest logit"

    def choices(self, chosen: Sequence[int], ours: Rows, theirs: Rows) -> None:
        """Each chosen token is the best of their row, unless the best two are closer than the rows differ."""
        for step, (token_id, our_row, their_row) in enumerate(zip(chosen, ours, theirs, strict=True)):
            self.tokens += 1
            best = int(their_row.argmax())
            if token_id == best:
                continue
            second, first = np.partition(their_row, -2)[-2:]
            gap, delta = float(first - second), float(np.abs(our_row - their_row).max())
            self._excuse(f"step {step}: {token_id} for {best}", gap, delta)

    def recorded(self, answer: Answer, rows: Rows) -> None:
        """Our rows [its tokens, vocab] against what is recorded of an answer: the greatest |logit|, some logits and the
        greedy choices."""
        peaks = np.array(answer.peaks)
        deltas = np.abs(rows[:, answer.columns] - np.array(answer.logits)).max(axis=1)
        deltas = np.maximum(deltas, np.abs(np.abs(rows).max(axis=1) - peaks))
        shares = deltas / peaks
        self.worst = max(self.worst, float(shares.max()))
        assert shares.max() <= LOGITS_TOLERANCE, f"step {shares.argmax()} is off by {shares.max():.2e}"
        for step, (token_id, row) in enumerate(zip(answer.token_ids, rows, strict=True)):
            self.tokens += 1
            if int(row.argmax()) != token_id:
                self._excuse(f"step {step}: {row.argmax()} for {token_id}", answer.gaps[step], float(deltas[step]))

    def _excuse(self, what: str, gap: float, delta: float) -> None:
        note = f"{what}, gap {gap:.3e}, greatest difference {delta:.3e}"
        assert gap < 2 * delta, note
        self.excused.append(note)
        print("excused:", note)
