"""Metrics on answers whose score is known, and intervals on distributions whose mean is."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.evaluation.scores import bootstrap_interval, exact, f1, match_all

PLACES = ("kitchen", "garden", "school")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("12345", 1 / 2),
        ("It is 12345, and ABCDE.", 1),
        ("abcde is 12345", 1),
        ("1234 5", 0),
        ("", 0),
        ("99 12345 ABCDE 77 OTHER", 1),
    ],
)
def test_match_all(text: str, score: float) -> None:
    assert match_all(text, ("12345", "ABCDE")) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("garden", 1),
        ("The Garden.", 1),
        ("**garden**", 1),
        ("Amos is in the garden now.", 1),
        ("garden or kitchen", 0),
        ("kitchen", 0),
        ("gardens", 0),
        ("a tree-garden", 0),
        ("", 0),
    ],
)
def test_exact(text: str, score: float) -> None:
    assert exact(text, ("garden",), PLACES) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("anchor, bridge", 1),
        ("1. Anchor\n2. Bridge", 1),
        ("The most common words are anchor and bridge.", 1),
        ("anchor anchor anchor", 2 / 3),
        ("anchor, canoe", 1 / 2),
        ("anchor, bridge, canoe, red-canoe", 2 * 2 / (4 + 2)),
        ("red-anchor", 0),
        ("", 0),
    ],
)
def test_f1(text: str, score: float) -> None:
    choices = ("anchor", "bridge", "canoe", "red-canoe", "red-anchor", "red-bridge")
    assert f1(text, ("anchor", "bridge"), choices) == pytest.approx(score)


def test_an_interval_is_of_its_values_alone() -> None:
    values = [number / 21 for number in range(22)]
    found = bootstrap_interval(values)
    assert found is not None and found == bootstrap_interval(values)
    assert (found.n, found.mean) == (22, pytest.approx(0.5)) and 0 <= found.low < 0.5 < found.high <= 1
    other, narrow = bootstrap_interval(values, seed=1), bootstrap_interval(values, confidence=0.5)
    assert other is not None and other != found and other.low == pytest.approx(found.low, abs=0.02)
    assert narrow is not None and found.low < narrow.low < narrow.high < found.high
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.5] * 4) == (4, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("mean", [0.5, 0.2])
def test_intervals_hold_the_mean_as_often_as_they_say(mean: float) -> None:
    """Of 400 samples of 60 right or wrong answers. The percentile interval is a little too narrow for so few."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        found = bootstrap_interval((random.random(60) < mean).astype(float).tolist(), num_resamples=500)
        assert found is not None
        held += found.low <= mean <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_intervals_narrow_with_the_root_of_the_number() -> None:
    widths = []
    for n in (50, 800):
        found = bootstrap_interval([0.0, 1.0] * (n // 2))
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)
