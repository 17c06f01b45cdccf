"""How right an answer is, from 0 to 1, and how sure a mean of such scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"\w+(?:-\w+)*")


def match_all(text: str, expected: Sequence[str], choices: Collection[str] = ()) -> float:
    """The share of the expected strings that stand somewhere in the answer, whatever else does, upper and lower case
    being one: RULER's string_match_all (Hsieh et al., 2024)."""
    said = text.lower()
    return sum(one.lower() in said for one in expected) / len(expected)


def exact(text: str, expected: Sequence[str], choices: Collection[str]) -> float:
    """1 if of the `choices` the answer names those that are expected, and no other; else 0."""
    return float(_named(text, choices) == {one.lower() for one in expected})


def f1(text: str, expected: Sequence[str], choices: Collection[str]) -> float:
    """The harmonic mean of precision and recall of the `choices` that the answer names. Other words of the answer do
    not count."""
    named, wanted = _named(text, choices), {one.lower() for one in expected}
    right = len(named & wanted)
    return 2 * right / (len(named) + len(wanted))


METRICS: dict[str, Callable[[str, Sequence[str], Collection[str]], float]] = {
    "match_all": match_all,
    "exact": exact,
    "f1": f1,
}


def _named(text: str, choices: Collection[str]) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)} & {one.lower() for one in choices}


class Interval(NamedTuple):
    """A mean of `n` values and the bounds of its confidence interval."""

    n: int
    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """The mean of values and its percentile bootstrap interval (Efron, 1979): the values are drawn again, with
    replacement, and the interval holds the middle `confidence` of the means. The same values give the same interval.

    None of no values. Where all values are equal the interval is a point, which says nothing of what others would be.
    """
    if not values:
        return None
    given = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = given[random.integers(len(given), size=(num_resamples, len(given)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(len(given), float(given.mean()), float(low), float(high))
