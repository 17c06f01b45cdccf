"""A draft that draws with the target's noise (Gumbel coupling) agrees with it at least as often as the bound says."""

from __future__ import annotations

import numpy as np
import pytest

from octavo import _C
from octavo.backends.cpu_sampling import sample_rows
from octavo.core.params import SamplingParams
from octavo.core.plan import RowResult
from octavo.core.want import Draw, Sample
from octavo.ops.rows import RowRequest

DRAWS = 4000


def drawn(machine: _C.Machine, logits: np.ndarray, seed: int) -> np.ndarray:
    """Tokens at so many positions, all from one row of logits."""
    draw = Sample((Draw(SamplingParams(temperature=1.0), seed, (0,), 0),))
    rows = sample_rows(machine, logits.reshape(1, -1), [RowRequest(0, position, draw) for position in range(DRAWS)])
    assert all(isinstance(row, RowResult) for row in rows)
    return np.array([row.draws[0].token_id for row in rows])  # type: ignore[union-attr]


@pytest.mark.parametrize("vocab", [2, 8, 100])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_acceptance_against_the_bound(vocab: int, spread: float) -> None:
    """At least (1 - TV) / (1 + TV), at most 1 - TV, where TV is the total variation of the two distributions (Daliri
    et al., 2024); above independent draws."""
    rng = np.random.default_rng(vocab)
    machine = _C.Machine(_C.instruction_sets()[0], 1)
    for number in range(4):
        target = rng.normal(0, 2, vocab).astype(np.float32)
        draft = (target + rng.normal(0, spread, vocab)).astype(np.float32)
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (target.astype(float), draft.astype(float)))
        distance = float(np.abs(p - q).sum() / 2)
        coupled = float(np.mean(drawn(machine, target, number) == drawn(machine, draft, number)))
        apart = float(np.mean(drawn(machine, target, number) == drawn(machine, draft, number + 100)))
        slack = 4 * 0.5 / DRAWS**0.5  # four standard errors
        assert (1 - distance) / (1 + distance) - slack <= coupled <= 1 - distance + slack
        assert apart == pytest.approx(float(p @ q), abs=slack)
        assert coupled >= apart - slack
