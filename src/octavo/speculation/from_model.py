"""Guesses that a model or a head made at the end of the step before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from octavo.core.plan import GrantResult
from octavo.core.proposer import Asked
from octavo.speculation.drafter import NO_GUESS, Guess

_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # of how sure it is
_UNKNOWN = len(_BOUNDS) + 1
_KINDS = _UNKNOWN + 1  # of a place
_PLACES = 6  # that are told from those behind them
_FIRST = 0.7  # of a place of which is not known how sure it is, before any was seen
_KEPT = 0.97  # of what was seen, when one more is


class FromModel:
    """Its Drafter: what it guessed waits with the results of a step. A kind is the place of a token in a guess, and how
    sure it was of that token, where it tells."""

    first_rates: Sequence[float] = [
        _FIRST if n == _UNKNOWN else (((0.0, *_BOUNDS)[n] + (*_BOUNDS, 1.0)[n]) / 2)
        for _ in range(_PLACES)
        for n in range(_KINDS)
    ]

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, tuple[int, ...], tuple[float, ...]]] = {}  # by sequence; tokens it has then
        self._shares = [[0.0] * _KINDS for _ in range(_PLACES)]  # of the kinds of a place

    def take(self, sequence_id: int, num_tokens: int, result: GrantResult) -> None:
        """What came with a result, for the sequence when it has so many tokens."""
        if result.guess:
            self._waiting[sequence_id] = num_tokens, result.guess, result.guess_chances

    def guess(self, asked: Asked, max_tokens: int, rates: list[float]) -> Guess:
        num_tokens, token_ids, sure = self._waiting.pop(asked.sequence.id, (0, (), ()))
        if num_tokens != asked.sequence.num_tokens:  # something else came between
            return NO_GUESS
        chosen = list(token_ids[:max_tokens])
        kinds: list[int] = []
        chances: list[float] = []
        chance = 1.0
        for number in range(len(chosen)):
            place = min(number, _PLACES - 1)
            kind = bisect_right(_BOUNDS, sure[number]) if sure else _UNKNOWN
            if number == place:
                self._shares[place] = [share * _KEPT for share in self._shares[place]]
                self._shares[place][kind] += 1 - _KEPT
            kinds.append(place * _KINDS + kind)
            chance *= rates[kinds[-1]]
            chances.append(chance)
        return Guess(chosen, list(range(-1, len(chosen) - 1)), kinds, chances)

    def by_place(self, rates: list[float], places: int) -> list[float]:
        """How often guesses in each place come true, whatever their kinds."""
        found: list[float] = []
        for place, shares in enumerate(self._shares[:places]):
            total = sum(shares)
            of_place = rates[place * _KINDS : (place + 1) * _KINDS]
            mean = sum(rate * share for rate, share in zip(of_place, shares, strict=True))
            found.append(mean / total if total else found[-1] if found else of_place[_UNKNOWN])
        return found + found[-1:] * (places - len(found))

    def sweep(self) -> None:
        if len(self._waiting) > 4096:
            self._waiting.clear()  # of sequences that ended
