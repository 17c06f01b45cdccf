"""How many guessed tokens pay: learnt from how often guesses come true and what steps cost, on this machine, now.

A step of R rows takes T(R) seconds. Of the tokens guessed, each comes true with a probability; it counts only if those
before it do. With m guesses in a step each of its S sequences waits longer, by T(R + m) / T(R), and a sequence gets
1 + p_1 + p_2 + ... tokens instead of one. Taken is what makes the product of all sequences' speeds greatest
(proportional fairness; Kelly, 1997): one sequence alone gets most tokens a second, and of many none is slowed down for
the sake of a few. Probabilities are learnt from all guesses, verified or not: what came shows whether a guess would
have come true.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

_ROW = 0.1  # of a step's time that a row more takes, until it was measured
_EXACT, _TILE = 16, 8  # rows up to which each number has a time of its own, and of which as many have one beyond
_FIRST = 4  # observations of a number of rows whose mean is taken
LEAST_GAIN = 0.04  # of the logarithm of speed, on the average: less is noise, and what guessing itself takes
DOUBT = 0.9  # of a predicted gain counts: what a guess costs is surer than what it brings
_MOST_AT_ONCE = 256  # guesses in a step
_MOST = 0.995  # no guess is surer
_REMEMBERED = 256.0  # guesses of a kind, of all requests
_OF_REQUEST = 32.0  # guesses of a request
_PRIOR = 4.0  # guesses that a kind's first estimate counts as
_REQUEST_PRIOR = 12.0  # and a request's: what it guesses counts in its kinds already
_WINDOW = 0.98  # what is left of the balance after a step
_MOST_LOST = 0.02  # of the time of steps with guesses, before guessing pauses
_PAUSES = (16, 1024)  # steps, the first and the longest


class StepCosts:
    """Seconds of a step by its rows, as last seen: a curve times a factor that follows everything which slows all steps
    down, such as longer contexts or a busy machine."""

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured, ascending
        self._least: list[float] = []  # by the same: the least seconds of so many rows or more; empty: not known now
        self._seconds: dict[int, float] = {}  # by rows, to be multiplied by the factor
        self._seen: dict[int, int] = {}
        self._factor = 1.0

    def observe(self, rows: int, seconds: float) -> None:
        if rows < 1 or seconds <= 0:
            return
        rows = _binned(rows)
        self._least = []
        known = self._seconds.get(rows)
        if known is None:
            self._seconds[rows], self._seen[rows] = seconds / self._factor, 1
            insort(self._rows, rows)
            return
        ratio = min(max(seconds / (known * self._factor), 0.5), 2.0)
        seen = self._seen[rows] = self._seen[rows] + 1
        if seen <= _FIRST:
            self._seconds[rows] = known * ratio ** (1 / seen)
        else:  # what it slows down it slows all down, as a rule
            self._seconds[rows] = known * ratio**0.05
            self._factor *= ratio**0.2

    def of(self, rows: int) -> float:
        """Predicted seconds; before anything was measured, in units of a step of one row."""
        if not self._rows:
            return _shape(rows)
        rows = _binned(rows)
        measured = self._rows
        # Of what was measured once, in a bad moment, more rows that took less time are the witness.
        least = self._least = self._least or _minima(self._seconds[more] for more in reversed(measured))
        at = bisect_left(measured, rows)
        if at == len(measured):
            return self._factor * least[-1] * _shape(rows) / _shape(measured[-1])
        if measured[at] == rows:
            return self._factor * least[at]
        if at == 0:
            return self._factor * least[0] * _shape(rows) / _shape(measured[0])
        share = (rows - measured[at - 1]) / (measured[at] - measured[at - 1])
        return self._factor * (least[at - 1] * (1 - share) + least[at] * share)


def _minima(seconds: Iterable[float]) -> list[float]:
    """Of each and those before it; the last comes first."""
    return list(accumulate(seconds, min))[::-1]


def _shape(rows: int) -> float:
    return 1 + _ROW * (rows - 1)


def _binned(rows: int) -> int:
    """The most rows that are taken to cost the same: kernels work on tiles of eight, and in long steps a few more or
    less do not count."""
    if rows <= _EXACT:
        return rows
    unit = max(_TILE, 1 << (rows.bit_length() - 4))
    return -(-rows // unit) * unit


class Acceptance:
    """How often guesses come true, by kind, and how much more or less often for a request."""

    def __init__(self, first: Sequence[float]) -> None:
        """`first`: by kind, an estimate to begin with."""
        self._rates = list(first)
        self._weights = [_PRIOR] * len(self._rates)  # how many guesses an estimate counts as
        self._requests: dict[str, tuple[float, float]] = {}  # request id -> (came true, expected to)

    def rates(self, request_id: str) -> list[float]:
        """By kind, for a request."""
        true, expected = self._requests.get(request_id, (0.0, 0.0))
        factor = (true + _REQUEST_PRIOR) / (expected + _REQUEST_PRIOR)
        return [rate * factor if rate * factor < _MOST else _MOST for rate in self._rates]

    def observe(self, request_id: str | None, kind: int, came_true: bool) -> None:
        """None: of a request that has ended."""
        rate, weight = self._rates[kind], self._weights[kind]
        if request_id is not None:
            true, expected = self._requests.get(request_id, (0.0, 0.0))
            keep = 1 - 1 / _OF_REQUEST
            self._requests[request_id] = true * keep + came_true, expected * keep + rate
        self._rates[kind] = rate + (came_true - rate) / (weight + 1)
        self._weights[kind] = min(weight + 1, _REMEMBERED)

    def forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)


class Brake:
    """Guessing pauses when it has lost more than predicted: whatever is wrong with the predictions, it costs little."""

    def __init__(self) -> None:
        self._balance = self._elapsed = 0.0
        self._pause = _PAUSES[0]
        self._left = 0  # steps of the pause

    @property
    def holds(self) -> bool:
        """Asked once a step."""
        if not self._left:
            return False
        self._left -= 1
        return True

    def observe(self, seconds: float, saved: float) -> None:
        """A step with guesses."""
        self._balance = self._balance * _WINDOW + saved
        self._elapsed = self._elapsed * _WINDOW + seconds
        if self._balance < -_MOST_LOST * max(self._elapsed, 32 * seconds):
            self._left, self._pause = self._pause, min(2 * self._pause, _PAUSES[1])
            self._balance = self._elapsed = 0.0
        elif self._balance > 0 and self._elapsed > 32 * seconds:
            self._pause = _PAUSES[0]


def choose(
    chances: Mapping[int, Sequence[float]], num_rows: int, num_sequences: int, costs: StepCosts
) -> dict[int, int]:
    """How many of each sequence's guessed tokens, the first of them, go into a step, by sequence id.

    Args:
        chances: by sequence id, of each token that it and all that it follows come true; none is above the one before.
        num_rows, num_sequences: rows of the step without guesses, and sequences in it.
    """
    plain = costs.of(num_rows)
    most = LEAST_GAIN * num_sequences
    # More than all of them cannot come, nor for less than one row: where that does not pay, as on most text that does
    # not repeat, nothing else need be looked at.
    of_one = num_sequences * math.log(costs.of(num_rows + 1) / plain)
    if DOUBT * sum(math.log1p(sum(each)) for each in chances.values()) - of_one <= most:
        return {}
    tokens = dict.fromkeys(chances, 1.0)  # that a sequence gets, with those taken so far
    waiting = [(-math.log1p(each[0]), sequence_id, 0) for sequence_id, each in chances.items() if each]
    heapq.heapify(waiting)  # by what the next token of each gains
    best, gained = 0, 0.0
    taken: list[int] = []
    while waiting and len(taken) < _MOST_AT_ONCE:
        gain, sequence_id, number = heapq.heappop(waiting)
        if gain > -LEAST_GAIN:
            break
        gained -= gain
        taken.append(sequence_id)
        each = chances[sequence_id]
        tokens[sequence_id] += each[number]
        if number + 1 < len(each):
            gain = -math.log1p(each[number + 1] / tokens[sequence_id])
            heapq.heappush(waiting, (gain, sequence_id, number + 1))
        value = DOUBT * gained - num_sequences * math.log(costs.of(num_rows + len(taken)) / plain)
        if value > most:
            best, most = len(taken), value
    return Counter(taken[:best])
