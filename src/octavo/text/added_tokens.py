"""Tokens that are found whole in the text before it is tokenised: control tokens and user-defined ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_MAX_LENGTHS = 4096  # such as every length up to 90; known models have no more than 40, none above 64


def check_lengths(texts: Iterable[str]) -> None:
    """Refuse tokens that begin alike and have so many lengths that to look for all of them at each character takes
    long. Raises ValueError."""
    for first, lengths in _lengths(texts).items():
        if sum(lengths) > _MAX_LENGTHS:
            raise ValueError(
                f"tokens that begin with {first!r} have {len(lengths)} lengths of {sum(lengths)} characters together; "
                f"{_MAX_LENGTHS} are allowed"
            )


def _lengths(texts: Iterable[str]) -> dict[str, set[int]]:
    """By first character."""
    found: dict[str, set[int]] = {}
    for text in texts:
        if text:
            found.setdefault(text[0], set()).add(len(text))
    return found


class AddedTokens:
    """Finds added tokens, leftmost first and of those that start at one place the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        """`ids`: token text -> token id; no text may be empty."""
        self._ids = dict(ids)
        lengths = _lengths(self._ids)
        # Thousands of tokens share a first character and a few lengths: one set lookup per length beats a large
        # alternation.
        self._lengths = {first: sorted(all_, reverse=True) for first, all_ in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    def split(self, text: str) -> Iterator[tuple[str, int]]:
        """Cut `text` into (piece, token id) where the id is -1 for ordinary text. Pieces are never empty."""
        done = position = 0
        while self._first is not None and (match := self._first.search(text, position)):
            start = match.start()
            position = start + 1
            for length in self._lengths[text[start]]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None and start + length <= len(text):
                    if start > done:
                        yield text[done:start], -1
                    done = position = start + length
                    yield text[start:done], token_id
                    break
        if done < len(text):
            yield text[done:], -1
