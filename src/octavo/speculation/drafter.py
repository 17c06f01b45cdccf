"""The contract of what guesses: `lookup` has the two that look into texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from octavo.core.proposer import Asked, Draft


class Guess(NamedTuple):
    """Tokens that may follow, the likeliest first."""

    token_ids: list[int]
    parents: list[int]  # of each the number of the one that it follows, before it; -1: the sequence
    kinds: list[int]  # of each: how often guesses of a kind come true is learnt
    chances: list[float]  # of each: that it and all that it follows come true; none is above the one before

    @property
    def draft(self) -> Draft:
        return Draft(tuple(self.token_ids), tuple(self.parents))


NO_GUESS = Guess([], [], [], [])


class Drafter(Protocol):
    """Guesses for one sequence at a time, between two steps; what it costs is engine time."""

    first_rates: Sequence[float]  # by kind: how often its guesses may come true, before any was seen

    def guess(self, asked: Asked, max_tokens: int, rates: list[float]) -> Guess:
        """At most so many tokens. `rates`: how often those of each kind come true."""
        ...

    def sweep(self) -> None:
        """Forget sequences that have ended."""
        ...
