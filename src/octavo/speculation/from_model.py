"""Guesses that a draft model made at the end of the step before."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.plan import GrantResult
from octavo.core.proposer import Asked
from octavo.speculation.drafter import NO_GUESS, Guess

_MOST = 64
_FIRST_RATE = 0.7  # of every place, before any was seen


class FromModel:
    """The Drafter of a model: it waits with the results of a step. A kind is the place of a token in a guess."""

    first_rates: Sequence[float] = [_FIRST_RATE] * _MOST

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, tuple[int, ...]]] = {}  # sequence id -> (tokens it is for, what follows)

    def take(self, sequence_id: int, num_tokens: int, result: GrantResult) -> None:
        """What came with a result, for the sequence when it has so many tokens."""
        if result.guess:
            self._waiting[sequence_id] = num_tokens, result.guess

    def guess(self, asked: Asked, max_tokens: int, rates: list[float]) -> Guess:
        num_tokens, token_ids = self._waiting.pop(asked.sequence.id, (0, ()))
        if num_tokens != asked.sequence.num_tokens:  # something else came between
            return NO_GUESS
        chosen = list(token_ids[:max_tokens])
        chances: list[float] = []
        chance = 1.0
        for place in range(len(chosen)):
            chance *= rates[place]
            chances.append(chance)
        return Guess(chosen, list(range(-1, len(chosen) - 1)), list(range(len(chosen))), chances)

    def sweep(self) -> None:
        if len(self._waiting) > 4096:
            self._waiting.clear()  # of sequences that ended
