"""The contract of what guesses: `lookup` has the two that look into texts."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from octavo.core.proposer import Asked


class Guess(NamedTuple):
    """Tokens that may follow."""

    token_ids: list[int]
    parents: list[int]  # of each the number of the one that it follows, before it; -1: the sequence
    kinds: list[int]  # of each: how often guesses of a kind come true is learnt

    @classmethod
    def chain(cls, token_ids: list[int], kinds: list[int]) -> Guess:
        return cls(token_ids, list(range(-1, len(token_ids) - 1)), kinds)


NO_GUESS = Guess([], [], [])


class Drafter(Protocol):
    """Guesses for one sequence at a time, between two steps; what it costs is engine time."""

    def guess(self, asked: Asked, max_tokens: int) -> Guess: ...

    def sweep(self) -> list[int]:
        """Forget sequences that have ended; their ids."""
        ...
