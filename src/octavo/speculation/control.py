"""How many guessed tokens pay: learnt from how often guesses come true and what steps cost, on this machine, now.

A step of R rows takes T(R) seconds. Of the tokens guessed, each comes true with a probability; it counts only if those
before it do. Adding the likeliest m of all sequences' guesses to a step makes it give D + p_1 + ... + p_m tokens, where
D sequences draw, in T(R + m): the m of most tokens a second is taken (goodput, as in SmartSpec; Liu et al., 2024).
Probabilities are learnt from all guesses, verified or not: what came shows whether a guess would have come true.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

_ROW = 0.1  # of a step's time that a row more takes, until it was measured
_EXACT = 16  # rows up to which each number has a time of its own
_FIRST = 4  # observations of a number of rows whose mean is taken
_LEAST_GAIN = 1.15  # tokens a second of what is added, over those of the step without: a prediction of less is noise
_LIKELY = 0.02  # tokens less probable are not looked at
_REMEMBERED = 256.0  # guesses of a kind, of all requests
_OF_REQUEST = 32.0  # guesses of a request
_PRIOR = 4.0  # guesses that a kind's first estimate, and a request's, counts as
_WINDOW = 0.98  # what is left of the balance after a step
_MOST_LOST = 0.02  # of the time of steps with guesses, before guessing pauses
_PAUSES = (64, 1024)  # steps, the first and the longest


class StepCosts:
    """Seconds of a step by its rows, as last seen: a curve times a factor that follows everything which slows all steps
    down, such as longer contexts or a busy machine."""

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured, ascending
        self._seconds: dict[int, float] = {}  # by rows, to be multiplied by the factor
        self._seen: dict[int, int] = {}
        self._factor = 1.0

    def observe(self, rows: int, seconds: float) -> None:
        if rows < 1 or seconds <= 0:
            return
        rows = _rounded(rows)
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
        at = bisect_left(self._rows, rows)
        if at == len(self._rows) or (at == 0 and self._rows[0] != rows):
            nearest = self._rows[min(at, len(self._rows) - 1)]
            return self._factor * self._seconds[nearest] * _shape(rows) / _shape(nearest)
        above = self._rows[at]
        if above == rows:
            return self._factor * self._seconds[above]
        below = self._rows[at - 1]
        share = (rows - below) / (above - below)
        return self._factor * (self._seconds[below] * (1 - share) + self._seconds[above] * share)


def _shape(rows: int) -> float:
    return 1 + _ROW * (rows - 1)


def _rounded(rows: int) -> int:
    """To four steps between two powers of two."""
    if rows <= _EXACT:
        return rows
    unit = 1 << (rows.bit_length() - 3)
    return (rows + unit // 2) // unit * unit


class Acceptance:
    """How probable guesses are, by kind, and how much more or less so for a request."""

    def __init__(self, first: Sequence[float]) -> None:
        """`first`: by kind, an estimate to begin with."""
        self._true = [_PRIOR * one for one in first]
        self._all = [_PRIOR] * len(first)
        self._requests: dict[str, tuple[float, float]] = {}  # request id -> (came true, expected to)

    def probability(self, request_id: str, kind: int) -> float:
        true, expected = self._requests.get(request_id, (0.0, 0.0))
        of_kind = self._true[kind] / self._all[kind]
        return min(of_kind * (true + _PRIOR) / (expected + _PRIOR), 0.995)

    def observe(self, request_id: str, kind: int, came_true: bool) -> None:
        true, expected = self._requests.get(request_id, (0.0, 0.0))
        keep = 1 - 1 / _OF_REQUEST
        self._requests[request_id] = (
            true * keep + came_true,
            expected * keep + self._true[kind] / self._all[kind],
        )
        keep = min(_REMEMBERED / (self._all[kind] + 1), 1.0)
        self._true[kind] = (self._true[kind] + came_true) * keep
        self._all[kind] = (self._all[kind] + 1) * keep

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
    probabilities: Mapping[int, Sequence[float]], num_rows: int, num_drawing: int, costs: StepCosts
) -> dict[int, list[int]]:
    """Which of each sequence's guessed tokens go into a step: their numbers, ascending, by sequence id.

    Args:
        probabilities: by sequence id, of each token that it and all that it follows come true; none is more probable
            than what it follows.
        num_rows, num_drawing: rows of the step without guesses, and sequences that draw a token in it.
    """
    likely = [
        (-probability, number, sequence_id)
        for sequence_id, each in probabilities.items()
        for number, probability in enumerate(each)
        if probability >= _LIKELY
    ]
    likely.sort()
    plain = costs.of(num_rows)
    tokens = float(num_drawing)
    if num_rows > num_drawing:  # prompts are worth the time that they take
        tokens += num_drawing * max(plain / costs.of(num_drawing) - 1, 0.0)
    best, most = 0, tokens / plain
    worth, added = most * _LEAST_GAIN, 0.0
    for number, (negative, _, _) in enumerate(likely, 1):
        added -= negative
        seconds = costs.of(num_rows + number)
        if (goodput := (tokens + added) / seconds) > most and added > (seconds - plain) * worth:
            best, most = number, goodput
    chosen: dict[int, list[int]] = {}
    for _, number, sequence_id in likely[:best]:
        chosen.setdefault(sequence_id, []).append(number)
    return {sequence_id: sorted(numbers) for sequence_id, numbers in chosen.items()}
