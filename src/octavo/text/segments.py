"""A long text cut into segments of a bounded number of tokens, at ends of sentences, with nothing lost.

The segments' token ids, one after another, are those of the whole text, and their character ranges lie side by side.
Where a segment ends depends on what stands before its end and a segment's length after it, on nothing further on: so
the first segments of two texts that begin alike are the same.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from octavo.text.tokenizer import Tokenizer

# What closes a sentence, with quotes and brackets after it; a paragraph does as well. A period inside "3.14" or "e.g."
# closes none.
_CLOSERS = r"[)\]}\"'\u00bb\u201d\u2019*_]*+"
_END = re.compile(
    # Each run of marks, and of empty lines, is looked at once: in time of the text's length, whatever it holds.
    rf"(?<![.!?\u2026])[.!?\u2026]++{_CLOSERS}(?=\s)"
    r"|[\u3002\uff01\uff1f]++[\u300d\u300f\u201d\u2019\uff09]*+"
    r"|\n(?:[^\S\n]*+\n)++"
)
_LINE_END = re.compile(r"(?<=\n)")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")
_PIECE = 16  # most characters of a word that are tokenised together, where they have to be taken piece by piece
_SPACE = re.compile(r"\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'\u201c])(?:[A-Z]|[Dd]r|[Mm]rs?|[Mm]s|[Pp]rof|St|vs|cf|e\.g|i\.e|al|No|Fig|pp?)\.$"
)


@dataclass(frozen=True, slots=True)
class TextSegment:
    token_ids: tuple[int, ...]
    start: int  # characters of the text
    stop: int


def split(tokenizer: Tokenizer, before: Sequence[int], text: str, most: int) -> list[TextSegment]:
    """Segments of at most `most` tokens of a text that stands after the tokens `before`. None of an empty text. Special
    tokens written out in it are text.

    A segment ends where the last of its sentences does. If none ends in its second half it ends with a line, or else a
    word, or if there is no space either, where it is full.
    """
    if most < 1:
        raise ValueError(f"a segment has at least 1 token, not {most}")
    if not text:
        return []
    token_ids = tokenizer.encode_following(before, text, plain=True)
    starts = _starts(tokenizer, token_ids, text)
    if starts is None:
        token_ids, starts = _by_pieces(tokenizer, before, text)
    return list(_segments(token_ids, starts, text, most))


def _starts(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int] | None:
    """The character at which each token starts, and the text's length; of a token that starts inside a character -1.
    None where the tokens do not spell the text: a tokenizer may write it anew, such as in another Unicode form."""
    starts, spelt, pending = [], 0, b""
    spaced = text.replace("\u2581", " ")  # as tokenizers read what they write for a space
    for token_id in token_ids:
        starts.append(-1 if pending else spelt)
        pending += tokenizer.token_bytes(token_id)
        try:
            piece = pending.decode()
        except UnicodeDecodeError as error:
            whole = pending[: error.start].decode()
            if error.end < len(pending) or len(pending) - error.start > 3:
                return None  # not the beginning of a character
            piece, pending = whole, pending[error.start :]
        else:
            pending = b""
        if not (text.startswith(piece, spelt) or spaced.startswith(piece, spelt)):
            return None
        spelt += len(piece)
    return None if pending or spelt != len(text) else [*starts, spelt]


def _by_pieces(tokenizer: Tokenizer, before: Sequence[int], text: str) -> tuple[list[int], list[int]]:
    """The same of a text that its tokens do not spell: it is tokenised word by word, each as what follows those
    before."""
    token_ids, starts = list(before), [-1] * len(before)
    words = [0, *(match.end() for match in _WORD_END.finditer(text)), len(text)]
    cuts = [cut for start, stop in pairwise(words) for cut in range(start, stop, _PIECE)]
    first = 0  # of what has no tokens yet
    for start, stop in pairwise([*cuts, len(text)]):
        ids = tokenizer.encode_following(token_ids[-64:], text[start:stop], plain=True)
        if ids:
            starts += [first, *[-1] * (len(ids) - 1)]
            token_ids += ids
            first = stop
    return token_ids[len(before) :], [*starts[len(before) :], len(text)]


def _segments(token_ids: Sequence[int], starts: Sequence[int], text: str, most: int) -> Iterator[TextSegment]:
    borders = [i for i, start in enumerate(starts) if start >= 0]  # tokens before which the text can be cut
    kinds = [_cuts(_sentence_ends(text), starts, borders)]
    kinds += [
        _cuts(((m.end(), m.end()) for m in end.finditer(text)), starts, borders) for end in (_LINE_END, _WORD_END)
    ]
    first = 0
    while first < len(token_ids):
        stop = len(token_ids)
        if stop - first > most:
            last = [cuts[bisect_right(cuts, first + most) - 1] for cuts in kinds if cuts and cuts[0] <= first + most]
            full = borders[bisect_right(borders, first + most) - 1]
            if full == first:  # not even a character ends in it
                full = borders[bisect_right(borders, first)]
            stop = next((cut for cut in last if cut > first + most // 2), full)
        yield TextSegment(tuple(token_ids[first:stop]), starts[first], starts[stop])
        first = stop


def _sentence_ends(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences end: from behind their last mark up to where the next one begins."""
    for match in _END.finditer(text):
        end = match.end()
        if match[0][0] == "\n":
            yield match.start() + 1, end
            continue
        if match[0] == "." and _ABBREVIATION.search(text, max(end - 8, 0), end):
            continue
        found = _SPACE.match(text, end)
        yield end, found.end() if found else end


def _cuts(ends: Iterator[tuple[int, int]], starts: Sequence[int], borders: Sequence[int]) -> list[int]:
    """For each range of characters the last token that starts in it; ascending, each once."""
    characters = [starts[border] for border in borders]
    cuts: list[int] = []
    for low, high in ends:
        place = bisect_right(characters, high) - 1
        if place >= 0 and characters[place] >= low and (not cuts or borders[place] > cuts[-1]):
            cuts.append(borders[place])
    return cuts
