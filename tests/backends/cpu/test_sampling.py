"""Rows of logits in C++ against the sampler in NumPy, and the same on every instruction set, for any number of threads
and of rows asked together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from octavo import _C
from octavo.backends.cpu import CpuOps
from octavo.core.params import SamplingParams
from octavo.core.plan import RowResult, TokenLogprobs
from octavo.core.want import Draw, NextLogprobs, Sample, Score, TopK, Want
from octavo.ops.rows import RowRequest, SamplingError
from octavo.sampling import Sampler
from octavo.sampling.noise import stream_id
from octavo.sampling.rows import NumpyRows
from tests.backends.cpu.harness import INSTRUCTION_SETS, Floats, array, machine, machines
from tests.sampling.requests import random_requests, random_rows

NUMPY = NumpyRows()
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 1000, 1024, 1025, 5000, 49152)
GREEDY = Draw(SamplingParams(temperature=0), 0, (0,), 1)


def ask(ops: CpuOps, row: Floats, wants: Sequence[Want], position: int = 0) -> list[RowResult]:
    """What is wanted of one row, in one call."""
    results = ops.sample(ops.from_numpy(row[None]), [RowRequest(0, position, want) for want in wants])
    return [result for result in results if isinstance(result, RowResult)]


def draws(ops: CpuOps, row: Floats, some: Sequence[Draw], position: int = 0) -> list[int]:
    """The draws' tokens of one row, in one call."""
    (result,) = ask(ops, row, [Sample(tuple(some))], position)
    return [draw.token_id for draw in result.draws]


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
    ops = machine(instruction_set)
    for row in special(size):
        assert draws(ops, row, [GREEDY]) == [NUMPY.greatest(row)[0]]
        tops = sorted({1, 2, 7, 64, 1000, size} & set(range(size + 1)))
        for k, result in zip(tops, ask(ops, row, [NextLogprobs((0,), k) for k in tops]), strict=True):
            assert result.logprobs is not None
            assert [entry.token_id for entry in result.logprobs.top] == NUMPY.best(row, k).tolist(), k
            assert [entry.rank for entry in result.logprobs.top] == list(range(1, k + 1))
        tokens = sorted({0, size // 2, size - 1})
        for token, result in zip(tokens, ask(ops, row, [NextLogprobs((i,), 0) for i in tokens]), strict=True):
            assert result.logprobs is not None and result.logprobs.token.rank == NUMPY.rank(row, token)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("size", SIZES)
def test_log_softmax(instruction_set: str, size: int) -> None:
    """As exact as float32 exponentials are, and the same bits on every instruction set."""
    ops, portable = machine(instruction_set), machine("portable")
    for row in special(size):
        wants = [TopK(size, GREEDY), NextLogprobs((size // 2,), 0)]
        (candidates, given), others = ask(ops, row, wants), ask(portable, row, wants)
        assert [candidates, given] == others
        got, expected = np.empty(size, np.float32), NUMPY.log_softmax(row)
        for token, value in candidates.candidates:
            got[token] = value
        assert len(candidates.candidates) == size
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)
        assert given.logprobs is not None
        exact = float(row[size // 2]) - NUMPY.log_sum_exp(row)
        assert given.logprobs.token.logprob == pytest.approx(exact, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("value", "text"), [(np.nan, "NaN"), (np.inf, r"\+inf"), (-np.inf, "nothing but -inf")])
@pytest.mark.parametrize("size", SIZES)
def test_damage_shows(value: float, text: str, size: int) -> None:
    """In the request that asks of the row, whatever it wants, and in no other."""
    wants = (Sample((GREEDY,)), TopK(2, GREEDY), Score(((0,),)), NextLogprobs((0,), 1))
    for name in _C.instruction_sets():
        for at in {0, size // 2, size - 1}:
            rows = np.stack([logits(size), logits(size), logits(size)])
            rows[1, at] = value
            if value == -np.inf:
                rows[1] = value
            ops = machine(name, 2)
            results = ops.sample(ops.from_numpy(rows), [RowRequest(r, 0, want) for want in wants for r in range(3)])
            for index, result in enumerate(results):
                if index % 3 == 1:
                    with pytest.raises(SamplingError, match=text):
                        raise result  # type: ignore[misc]
                else:
                    assert isinstance(result, RowResult)


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
    params = SamplingParams(**filters)
    rows = np.stack(special(size))
    requests = [
        RowRequest(row, position, Sample((Draw(params, 2**64 - 1 - row, (row, 7)[: row % 3], 1),)))
        for row in range(len(rows))
        for position in range(3 if size > 1000 else 25)
    ]
    expected = Sampler().sample(rows, requests)
    assert len({result.draws[0].token_id for result in expected if isinstance(result, RowResult)}) > 1
    for name in _C.instruction_sets():
        ops = machine(name, 2)
        assert ops.sample(ops.from_numpy(rows), requests) == expected, name


def test_absurd_temperatures() -> None:
    """All tokens are as likely, but for those that cannot be drawn. Guards against a reciprocal that becomes 0."""
    row = np.full(3000, -np.inf, np.float32)
    row[[5, 6, 7, 2000]] = 1.0, 0.5, 0.0, 0.5
    for name in _C.instruction_sets():
        for top_p, expected in ((1.0, {5, 6, 7, 2000}), (0.5, {5, 6})):
            params = SamplingParams(temperature=1e300, top_p=top_p)
            assert set(draws(machine(name), row, [Draw(params, seed, (), 1) for seed in range(60)])) == expected


def test_draws_follow_the_probabilities() -> None:
    """30,000 draws from 5 tokens: each within five standard deviations of its share."""
    row = np.log(np.array([0.4, 0.3, 0.2, 0.07, 0.03], np.float32))
    count = 30_000
    some = [Draw(SamplingParams(), 5, (1, index), 1) for index in range(count)]
    drawn = np.bincount(draws(machine("portable", 2), row, some), minlength=5)
    share = np.exp(row)
    assert (np.abs(drawn - count * share) < 5 * np.sqrt(count * share * (1 - share))).all()


def test_long_streams_and_steps() -> None:
    """A path of integers keys the noise as it does in NumPy; numbers past 32 bits too."""
    row = logits(300)
    drawn = set()
    some = [
        Draw(SamplingParams(), 9, stream, 1) for stream in ((), (0,), (0, 0), (2**40,), tuple(range(30)), (1, 2**63))
    ]
    for position in (0, 1, 2**31):
        ours = draws(machine("portable"), row, some, position)
        theirs = Sampler().run(row, Sample(tuple(some)), position)
        assert ours == [draw.token_id for draw in theirs.draws]
        drawn |= set(ours)
    assert stream_id(9, (0,)) != stream_id(9, (0, 0)) and len(drawn) > 3


@pytest.mark.parametrize(("vocab", "batches"), [(40, 60), (1000, 40), (49152, 8)])
def test_everything_at_random(vocab: int, batches: int) -> None:
    """All wants with all processors on all kinds of rows. Tokens, ranks and errors are NumPy's, values are close to
    its, and all bits are the same on every instruction set, for any number of threads and of rows asked together."""
    answered = failed = 0
    for seed in range(batches):
        random = np.random.default_rng([vocab, seed])
        rows = random_rows(random, 6, vocab)
        requests = random_requests(random, 1 + seed % 14, 6, vocab)
        with np.errstate(all="ignore"):
            expected = Sampler().sample(rows, requests)
        bits = None
        for note, ops in machines():
            given = ops.from_numpy(rows)
            results = [comparable(result) for result in ops.sample(given, requests)]
            bits = results if bits is None else bits
            assert results == bits, (seed, note)
        alone = [comparable(ops.sample(given, [request])[0]) for request in requests]
        assert alone == bits, seed
        for result, numpy in zip(ops.sample(given, requests), expected, strict=True):
            close(result, numpy)
            answered += isinstance(result, RowResult)
            failed += isinstance(result, SamplingError)
    assert failed > 0 and answered > 4 * failed


def comparable(result: RowResult | SamplingError) -> RowResult | str:
    return str(result) if isinstance(result, SamplingError) else result


def close(result: RowResult | SamplingError, expected: RowResult | SamplingError) -> None:
    if isinstance(result, SamplingError) or isinstance(expected, SamplingError):
        assert str(result) == str(expected)
        return
    assert result.position == expected.position
    assert [draw.token_id for draw in result.draws] == [draw.token_id for draw in expected.draws]
    for ours, theirs in zip(result.draws, expected.draws, strict=True):
        close_entries(ours.logprobs, theirs.logprobs)
    close_entries(result.logprobs, expected.logprobs)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6, atol=2e-6)
    # Values may round to ties where NumPy's do not: the order is that of the values, and these are close.
    assert len(result.candidates) == len(expected.candidates)
    values = [value for _, value in result.candidates]
    assert result.candidates == tuple(sorted(result.candidates, key=lambda one: (-one[1], one[0])))
    np.testing.assert_allclose(values, [value for _, value in expected.candidates], rtol=1e-6, atol=2e-6)
    assert len(result.candidate_logprobs) == len(expected.candidate_logprobs)
    for (token, _), entry in zip(result.candidates, result.candidate_logprobs, strict=bool(result.candidate_logprobs)):
        assert entry.token.token_id == token
    tokens = [token for token, _ in result.candidates]
    if tokens == [token for token, _ in expected.candidates]:
        for one, other in zip(result.candidate_logprobs, expected.candidate_logprobs, strict=True):
            close_entries(one, other)


def close_entries(ours: TokenLogprobs | None, theirs: TokenLogprobs | None) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
        return
    for one, other in zip((ours.token, *ours.top), (theirs.token, *theirs.top), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, rel=1e-6, abs=2e-6)


def test_what_does_not_fit() -> None:
    """Token ids and rows from outside, wants of another kind: refused in words, not read past the end."""
    ops = CpuOps(threads=1)
    given = ops.from_numpy(array(2, 10))
    biased = GREEDY._replace(params=SamplingParams(logit_bias={10: 1.0}))
    allowed = GREEDY._replace(params=SamplingParams(allowed_token_ids=[3, 10]))
    for request in (
        RowRequest(2, 0, Sample((GREEDY,))),
        RowRequest(0, 0, Sample((biased,))),
        RowRequest(0, 0, TopK(1, allowed)),
        RowRequest(0, 0, Score(((1, 10),))),
        RowRequest(0, 0, Score(((-1,),))),
        RowRequest(0, 0, NextLogprobs((10,), 0)),
    ):
        with pytest.raises(IndexError, match=r"no such row|outside the vocabulary"):
            ops.sample(given, [RowRequest(0, 0, Sample((GREEDY,))), request])
    with pytest.raises(ValueError, match="at least one value"):
        ops.sample(ops.from_numpy(np.empty((1, 0), np.float32)), [RowRequest(0, 0, Sample((GREEDY,)))])
    assert ops.sample(given, []) == []
    hot = (-1.0, 0, 1.0, 0.0, 0, (), None, None)
    row = array(1, 10)
    for kind, want, text in (("sample", [hot], "temperature"), ("hidden", (0,), "no such kind of want: hidden")):
        with pytest.raises(ValueError, match=text):
            _C.sample(ops.machine, row, [(0, 0, kind, want)])
    for wrong in (row[0], row.astype(np.float64), row[:, ::2]):
        with pytest.raises(TypeError):
            _C.sample(ops.machine, wrong, [])
