"""Token counts of a sequence, for penalties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.core.want import Counts


class TokenCounts:
    """Which tokens the prompt holds and how often each was generated. Attached to a sequence (SequenceState)."""

    __slots__ = ("_history", "output", "prompt")

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.prompt: frozenset[int] = frozenset(prompt_token_ids)
        self.output: dict[int, int] = {}  # token id -> occurrences, each >= 1
        self._history: list[int] = []

    @property
    def counts(self) -> Counts:
        """As they are now."""
        return Counts(self.prompt, tuple(self.output.items()))

    @property
    def num_tokens(self) -> int:
        """That were generated."""
        return len(self._history)

    def fork(self) -> TokenCounts:
        copy = TokenCounts.__new__(TokenCounts)
        copy.prompt = self.prompt
        copy.output = dict(self.output)
        copy._history = list(self._history)
        return copy

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self.output[token_id] = self.output.get(token_id, 0) + 1
        self._history.extend(token_ids)

    def rollback(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            token_id = self._history.pop()
            left = self.output[token_id] - 1
            if left:
                self.output[token_id] = left
            else:
                del self.output[token_id]
