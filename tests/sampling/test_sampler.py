"""The sampler against plain definitions, and transformers' processors where it has them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from octavo.core.params import SamplingParams
from octavo.core.token_counts import TokenCounts
from octavo.core.want import Draw, NextLogprobs, Sample, Score, TopK
from octavo.ops.rows import SamplingError
from octavo.sampling import Sampler
from octavo.sampling.rows import NumpyRows, log_softmax

VOCAB = 40
sampler = Sampler()
best = NumpyRows().best


def row(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def draw(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> tuple[Draw, list[int]]:
    prompt, output = prompt or [1, 2, 3], output or []
    sampling = SamplingParams(**params)
    counts = None
    if sampling.has_penalties:
        counts = TokenCounts(prompt)
        counts.advance(output)
    bad = tuple(tuple(int(x) for x in word.split()) for word in sampling.bad_words or ())
    made = Draw(sampling, sampling.seed or 0, (0,), len(prompt), bad, tuple(sampling.stop_token_ids or ()))
    token_ids = prompt + output
    return made.at(token_ids, None if counts is None else counts.counts), token_ids


def sample(logits: np.ndarray, **params: Any) -> int:
    made, token_ids = draw(**params)
    return sampler.run(logits, Sample((made,)), len(token_ids) - 1).draws[0].token_id


def kept(logits: np.ndarray, **params: Any) -> list[int]:
    sampling = SamplingParams(**params)
    left, _ = NumpyRows().surviving(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return [int(i) for i in left]


def test_greedy_takes_the_best_and_of_equals_the_lower_id() -> None:
    logits = row()
    assert sample(logits, temperature=0) == int(np.argmax(logits))
    logits[[7, 9]] = logits.max() + 1
    assert sample(logits, temperature=0) == 7


def test_the_row_is_not_changed() -> None:
    logits = row()
    before = logits.copy()
    sample(logits, temperature=0.5, repetition_penalty=1.5, logit_bias={3: 5}, logprobs=3, top_k=4)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("k", [1, 2, 5, VOCAB, VOCAB + 5, 0, -1])
def test_top_k(k: int) -> None:
    logits = row()
    expected = sorted(np.argsort(-logits)[: k if k > 0 else VOCAB].tolist())
    assert kept(logits, top_k=k) == expected


def test_top_k_keeps_the_lower_ids_of_equals() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[20] = 1
    assert kept(logits, top_k=4) == [0, 1, 2, 20]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_top_p_is_the_smallest_set_that_reaches_it(p: float, temperature: float) -> None:
    logits = row(3)
    probabilities = np.exp(log_softmax((logits / np.float32(temperature)).astype(np.float32)))
    order = np.argsort(-probabilities)
    count = VOCAB if p == 1.0 else int(np.searchsorted(np.cumsum(probabilities[order]), p) + 1)
    assert kept(logits, top_p=p, temperature=temperature) == sorted(order[:count].tolist())


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_is_relative_to_the_best(min_p: float) -> None:
    logits = row(4)
    probabilities = np.exp(log_softmax(logits))
    assert kept(logits, min_p=min_p) == np.flatnonzero(probabilities >= min_p * probabilities.max() - 1e-12).tolist()


def test_filters_act_in_order() -> None:
    """min_p, then top_k, then top_p on what is left, renormalised."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))
    assert kept(logits, top_k=2, top_p=0.57) == [0]  # 0.4 / 0.7 = 0.571 reaches it alone
    assert kept(logits, top_k=2, top_p=0.58) == [0, 1]
    assert kept(logits, top_p=0.58) == [0, 1]
    assert kept(logits, top_p=0.71) == [0, 1, 2]
    assert kept(logits, top_k=2, top_p=0.71) == [0, 1]


def test_penalties_equal_their_formulas() -> None:
    logits = row(5)
    prompt, output = [1, 2, 3], [3, 4, 4, 4, 5]
    made, token_ids = draw(
        prompt, output, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.2, temperature=0
    )
    values = logits.astype(np.float64)
    for token in (1, 2, 3, 4, 5):
        values[token] = values[token] / 1.3 if values[token] > 0 else values[token] * 1.3
    for token in set(output):
        values[token] -= 0.7 + 0.2 * output.count(token)
    expected = int(values.argmax())
    assert sampler.run(logits, Sample((made,)), len(token_ids) - 1).draws[0].token_id == expected
    processed = sampler.run(logits, TopK(VOCAB, made), len(token_ids) - 1).candidates
    assert len(processed) == VOCAB


def test_repetition_penalty_equals_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = row(6)
    made, token_ids = draw([1, 2, 3], [9, 9], repetition_penalty=1.7)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([token_ids]), torch.tensor(log_softmax(logits)[None]))
    ours = dict(sampler.run(logits, TopK(VOCAB, made), len(token_ids) - 1).candidates)
    assert np.allclose([ours[i] for i in range(VOCAB)], theirs[0].numpy(), atol=1e-6)


def test_top_k_candidates_are_best_first_and_ties_go_to_the_lower_id() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[30, 10]] = 2.0
    made, _ = draw()
    candidates = sampler.run(logits, TopK(4, made), 2).candidates
    assert [token for token, _ in candidates] == [10, 30, 0, 1]
    assert candidates[0][1] == pytest.approx(log_softmax(logits)[10], abs=1e-6)


def test_logit_bias_and_allowed_tokens() -> None:
    logits = row(7)
    assert sample(logits, temperature=0, logit_bias={13: 100.0}) == 13
    assert sample(logits, temperature=0, allowed_token_ids=[4, 8]) == (4 if logits[4] >= logits[8] else 8)
    for seed in range(20):
        assert sample(logits, temperature=5.0, allowed_token_ids=[4, 8], seed=seed) in (4, 8)


def test_bad_words_bans_only_the_completing_token() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[9] = 5
    logits[8] = 4
    assert sample(logits, temperature=0, bad_words=["9"]) == 8
    assert sample(logits, temperature=0, bad_words=["5 9"], output=[4]) == 9
    assert sample(logits, temperature=0, bad_words=["5 9"], output=[4, 5]) == 8
    assert sample(logits, temperature=0, bad_words=["3 9"], prompt=[1, 2, 3]) == 9, "the prompt is not output"


def test_min_tokens_bans_end_tokens_until_then() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[9] = 5
    params: dict[str, Any] = {"temperature": 0, "stop_token_ids": [9], "min_tokens": 2}
    assert sample(logits, **params, output=[]) == 0
    assert sample(logits, **params, output=[1]) == 0
    assert sample(logits, **params, output=[1, 1]) == 9


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    draws = [sample(logits, temperature=1.0, seed=seed) for seed in range(4000)]
    counts = np.bincount(draws, minlength=4)
    expected = np.array([0.5, 0.25, 0.125, 0.125]) * len(draws)
    assert ((counts - expected) ** 2 / expected).sum() < 25


def test_temperature_extremes_do_not_overflow() -> None:
    logits = row(8)
    assert sample(logits, temperature=1e-300) == int(np.argmax(logits))
    assert 0 <= sample(logits, temperature=1e300) < VOCAB


def test_one_row_feeds_many_draws() -> None:
    logits = row(9, scale=0.1)
    sampling = SamplingParams(temperature=1.0, n=8)
    draws = tuple(Draw(sampling, 5, (index,), 1) for index in range(8))
    together = [drawn.token_id for drawn in sampler.run(logits, Sample(draws), 0).draws]
    alone = [sampler.run(logits, Sample((one,)), 0).draws[0].token_id for one in draws]
    assert together == alone
    assert len(set(together)) > 1


def test_score_is_the_mass_of_a_set() -> None:
    logits = row(10)
    probabilities = np.exp(log_softmax(logits))
    scores = sampler.run(logits, Score(((3,), (1, 2, 5), tuple(range(VOCAB)))), 0).scores
    assert scores == pytest.approx(
        [math.log(probabilities[3]), math.log(probabilities[[1, 2, 5]].sum()), 0.0], abs=1e-9
    )


def test_logprobs_and_ranks() -> None:
    logits = row(11)
    logits[5] = logits[6]
    values = log_softmax(logits)
    order = np.argsort(-logits, kind="stable")
    for rank, token in enumerate(order, 1):
        found = sampler.run(logits, NextLogprobs((int(token),), 3), 0).logprobs
        assert found is not None
        assert found.token.rank == rank
        assert found.token.logprob == pytest.approx(values[token])
        assert [entry.token_id for entry in found.top] == order[:3].tolist()
    found = sampler.run(logits, NextLogprobs((0,), 0), 0).logprobs
    assert found is not None and found.top == ()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = row(12)
    made, token_ids = draw(temperature=0, logit_bias={7: 50.0}, logprobs=1)
    drawn = sampler.run(logits, Sample((made,)), len(token_ids) - 1).draws[0]
    assert drawn.token_id == 7 and drawn.logprobs is not None
    assert drawn.logprobs.token.logprob == pytest.approx(log_softmax(logits)[7])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_logits_are_an_error_not_a_token(value: float) -> None:
    logits = row()
    logits[3] = value
    made, _ = draw()
    with pytest.raises(SamplingError, match=r"NaN|inf"):
        sampler.run(logits, Sample((made,)), 2)


def test_nothing_left_to_draw_is_an_error() -> None:
    made, _ = draw(allowed_token_ids=[4], bad_words=["4"])
    with pytest.raises(SamplingError, match="no token can be drawn"):
        sampler.run(row(), Sample((made,)), 2)


def test_best_equals_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 6, 20).astype(np.float64)
        k = int(rng.integers(1, 21))
        assert best(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()
