"""Rows of logits in C++ against the sampler's own NumPy, and the same on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo import _C
from octavo.backends.cpu import CpuOps
from octavo.ops.rows import RowOps
from octavo.sampling.noise import stream_id
from octavo.sampling.rows import NumpyRows
from tests.backends.cpu.harness import INSTRUCTION_SETS, Floats, array, machine

NUMPY = NumpyRows()
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 1000, 1024, 1025, 5000, 49152)


def rows_of(name: str = "portable") -> RowOps:
    return machine(name).rows


def logits(size: int, seed: int = 0, scale: float = 4.0) -> Floats:
    return array(size, seed=seed) * np.float32(scale)


def special(size: int) -> list[Floats]:
    """Ordinary rows, flat ones, ties, masked tokens, one token alone."""
    tied = np.round(logits(size, 1)).astype(np.float32)
    masked = logits(size, 2)
    masked[np.random.default_rng(3).random(size) < 0.7] = -np.inf
    masked[size // 2] = 0.5
    alone = np.full(size, -np.inf, np.float32)
    alone[size - 1] = -3.0
    return [logits(size), tied, masked, alone, np.zeros(size, np.float32), logits(size, 4, 1e30)]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("size", SIZES)
def test_greatest_best_and_rank(instruction_set: str, size: int) -> None:
    rows = rows_of(instruction_set)
    for row in special(size):
        assert rows.greatest(row) == NUMPY.greatest(row)
        for k in {1, 2, 7, 64, 1000, size} & set(range(size + 1)):
            assert list(rows.best(row, k)) == list(NUMPY.best(row, k)), k
        for index in {0, size // 2, size - 1}:
            assert rows.rank(row, index) == NUMPY.rank(row, index)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("size", SIZES)
def test_log_softmax(instruction_set: str, size: int) -> None:
    """As exact as float32 exponentials are, and the same bits on every instruction set."""
    rows, portable = rows_of(instruction_set), rows_of()
    for row in special(size):
        assert rows.log_sum_exp(row) == portable.log_sum_exp(row)
        assert rows.log_sum_exp(row) == pytest.approx(NUMPY.log_sum_exp(row), rel=1e-6, abs=1e-6)
        got, expected = rows.log_softmax(row), NUMPY.log_softmax(row)
        assert got.tobytes() == portable.log_softmax(row).tobytes()
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("size", SIZES)
def test_damage_shows(value: float, size: int) -> None:
    for name in _C.instruction_sets():
        for at in {0, size // 2, size - 1}:
            row = logits(size)
            row[at] = value
            _, highest = rows_of(name).greatest(row)
            assert np.isnan(highest) if np.isnan(value) else highest == np.inf
            if np.isnan(value):
                for k in {1, size // 2, size} - {0}:
                    with pytest.raises(ValueError, match="NaN"):
                        rows_of(name).best(row, k)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.8},
    {"top_p": 0.5, "min_p": 1e-4, "temperature": 2.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", (2, 17, 1000, 49152))
def test_draws(filters: dict[str, Any], size: int) -> None:
    """The same tokens as NumPy draws, with the same noise, on every instruction set."""
    asked = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    drawn = set()
    for seed, row in enumerate(special(size)):
        for position in range(3 if size > 1000 else 25):
            noise = {"seed": 2**64 - 1 - seed, "stream": (seed, 7)[: seed % 3], "position": position}
            expected = NUMPY.draw(row, **asked, **noise)
            for name in _C.instruction_sets():
                assert rows_of(name).draw(row, **asked, **noise) == expected, (seed, position, name)
            drawn.add(expected)
    assert len(drawn) > 1


def test_absurd_temperatures() -> None:
    """All tokens are as likely, but for those that cannot be drawn. Guards against a reciprocal that becomes 0."""
    row = np.full(3000, -np.inf, np.float32)
    row[[5, 6, 7, 2000]] = 1.0, 0.5, 0.0, 0.5
    for name in _C.instruction_sets():
        for top_p, expected in ((1.0, {5, 6, 7, 2000}), (0.5, {5, 6})):
            asked: dict[str, Any] = {"temperature": 1e300, "top_k": 0, "top_p": top_p, "min_p": 0.0, "stream": ()}
            drawn = {rows_of(name).draw(row, **asked, seed=seed, position=1) for seed in range(60)}
            assert drawn == expected


def test_draws_follow_the_probabilities() -> None:
    """30,000 draws from 5 tokens: each within five standard deviations of its share."""
    row = np.log(np.array([0.4, 0.3, 0.2, 0.07, 0.03], np.float32))
    rows, count = rows_of(), 30_000
    asked = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5, "stream": (1,)}
    drawn = np.bincount([rows.draw(row, position=i, **asked) for i in range(count)], minlength=5)
    share = np.exp(row)
    assert (np.abs(drawn - count * share) < 5 * np.sqrt(count * share * (1 - share))).all()


def test_long_streams_and_steps() -> None:
    """A path of integers keys the noise as it does in NumPy; numbers past 32 bits too."""
    row = logits(300)
    asked = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 9}
    drawn = set()
    for stream in ((), (0,), (0, 0), (2**40,), tuple(range(30)), (1, 2**63)):
        for position in (0, 1, 2**31):
            ours = rows_of().draw(row, stream=stream, position=position, **asked)
            assert ours == NUMPY.draw(row, stream=stream, position=position, **asked)
            drawn.add(ours)
    assert stream_id(9, (0,)) != stream_id(9, (0, 0)) and len(drawn) > 3


def test_rows_that_do_not_fit() -> None:
    ops = CpuOps(threads=1)
    empty = np.empty(0, np.float32)
    for call in (
        lambda: ops.rows.greatest(empty),
        lambda: ops.rows.log_sum_exp(empty),
        lambda: ops.rows.best(empty, 0),
    ):
        with pytest.raises(ValueError, match="at least one"):
            call()
    row = logits(10)
    with pytest.raises(ValueError, match="more than there are"):
        ops.rows.best(row, 11)
    with pytest.raises(IndexError):
        ops.rows.rank(row, 10)
    with pytest.raises(ValueError, match="temperature"):
        ops.rows.draw(row, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, stream=(), position=0)
    with pytest.raises(TypeError):
        ops.rows.greatest(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError):
        ops.rows.greatest(np.zeros(4, np.float64))  # type: ignore[arg-type]
