"""Guesses that a model or a head made at the end of the step before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from octavo.core.plan import GrantResult
from octavo.core.proposer import Asked
from octavo.speculation.drafter import NO_GUESS, Guess

if TYPE_CHECKING:
    from octavo.core.sequence import Sequence

_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # of how sure it is
_UNKNOWN = len(_BOUNDS) + 1
_KINDS = _UNKNOWN + 1  # of a place
_PLACES = 6  # that are told from those behind them
_FIRST = 0.7  # of a place of which is not known how sure it is, before any was seen
_KEPT = 0.97  # of what was seen, when one more is


class FromModel:
    """Its Drafter: what it guessed waits with the results of a step. A kind is the place of a token in a guess, and how
    sure it was of that token, where it tells."""

    first_rates: SequenceOf[float] = [
        _FIRST if n == _UNKNOWN else (((0.0, *_BOUNDS)[n] + (*_BOUNDS, 1.0)[n]) / 2)
        for _ in range(_PLACES)
        for n in range(_KINDS)
    ]

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, tuple[int, ...], tuple[float, ...]]] = {}  # by sequence; tokens it has then
        self._read: dict[
            int, int
        ] = {}  # by sequence: tokens that a model knows of it, since it guessed what follows them
        self._shares = [[0.0] * _KINDS for _ in range(_PLACES)]  # of the kinds of a place

    def take(self, sequence_id: int, num_tokens: int, result: GrantResult) -> None:
        """What came with a result, for the sequence when it has so many tokens."""
        if result.guess:
            self._waiting[sequence_id] = num_tokens, result.guess, result.guess_chances
            self._read[sequence_id] = num_tokens

    def num_unread(self, sequence: Sequence) -> int:
        """Tokens that a model reads before it guesses, at most: it may have found some in the cache."""
        return sequence.num_tokens - self._read.get(sequence.id, 0)

    def has_one_for(self, sequence_id: int) -> bool:
        return sequence_id in self._waiting

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

    def by_place(self, rates: list[float], places: int, least: float = 0.0) -> list[tuple[float, float]]:
        """Of each place: the share of guesses that come true at least so often, by their kinds, and of these the share,
        of all, that comes true."""
        found: list[tuple[float, float]] = []
        for place, seen in enumerate(self._shares[:places]):
            of_place = rates[place * _KINDS : (place + 1) * _KINDS]
            shares, total = seen, sum(seen)
            if not total and found:
                break
            if not total:  # nothing was seen yet
                shares, of_place, total = [1.0], of_place[_UNKNOWN:], 1.0
            taken = [(share, rate) for share, rate in zip(shares, of_place, strict=True) if rate >= least]
            found.append((sum(share for share, _ in taken) / total, sum(share * rate for share, rate in taken) / total))
        return found + found[-1:] * (places - len(found))

    def sweep(self) -> None:
        """Of sequences that ended. One that goes on loses a guess, and counts as unread for a step."""
        for known in (self._waiting, self._read):
            if len(known) > 4096:
                known.clear()
