"""SentencePiece-style BPE that merges by token score, for GGUF files of kind ``llama``.

Such a file holds no merges, only a score per token: the best-scoring token that two neighbours make is merged first.
The `tokenizers` library needs an explicit list of merges (514,906 for Gemma 3, about two seconds to derive and load),
so the merging is done here, straight from the vocabulary, which costs nothing to load.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence

from octavo.text.added_tokens import AddedTokens

SPACE = "\u2581"  # stands for a space inside tokens
_SEGMENT = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_CACHED_SEGMENT = 32  # characters; longer segments seldom repeat
_CACHE_ENTRIES = 1 << 16


class ScoreBPE:
    """Text -> token ids by merging neighbours in order of rank."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        ranks: Sequence[float],
        added: AddedTokens,
        byte_ids: Sequence[int] | None,
        unknown_id: int | None,
        add_space_prefix: bool,
    ) -> None:
        """`vocab`: token text -> id. `ranks`: per id, lowest merged first. `byte_ids`: the ids of the 256 byte tokens,
        for characters that are not tokens, or None; without them such a run of characters becomes one `unknown_id`.
        """
        self._vocab = vocab
        self._ranks = ranks
        self._added = added
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        self._add_space_prefix = add_space_prefix
        self._cache: dict[str, list[int]] = {}
        self._joining: set[str] | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which must be free of lone surrogates. Nothing is added at the beginning or end.

        With `add_space_prefix` every piece between added tokens gets a space in front, as in llama.cpp and in the
        tokenizer.json of such models (its Prepend normaliser), also one that begins with a space: as SentencePiece
        has it, " a" and "a" differ.
        """
        ids: list[int] = []
        prefix = SPACE if self._add_space_prefix else ""
        for piece, token_id in self._added.split(text):
            if token_id >= 0:
                ids.append(token_id)
            else:
                self._encode_piece(prefix + piece.replace(" ", SPACE), ids)
        return ids

    def _encode_piece(self, piece: str, ids: list[int]) -> None:
        """Cut before each run of spaces: exact wherever no token holds the two characters on either side of the cut."""
        if self._joining is None:
            self._joining = self._find_joining()
        held = ""
        for segment in _SEGMENT.findall(piece):
            held += segment
            if segment[-1] not in self._joining:
                ids += self._encode_segment(held)
                held = ""
        if held:
            ids += self._encode_segment(held)

    def _find_joining(self) -> set[str]:
        """Characters that some token holds right before a space: no cut there."""
        border = "\udfff"  # a lone surrogate is in no token
        return {part[-1] for part in border.join(self._vocab).split(SPACE)[:-1] if part} - {border}

    def _encode_segment(self, segment: str) -> list[int]:
        if len(segment) > _CACHED_SEGMENT:
            return self._merge(segment)
        ids = self._cache.get(segment)
        if ids is None:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache = {}
            ids = self._cache[segment] = self._merge(segment)
        return ids

    def _symbols(self, segment: str) -> tuple[list[str], list[int]]:
        """One symbol a character: its text (empty where it cannot merge) and its id."""
        texts: list[str] = []
        ids: list[int] = []
        for char in segment:
            token_id = self._vocab.get(char)
            if token_id is not None:
                texts.append(char)
                ids.append(token_id)
            elif self._byte_ids is not None:
                encoded = char.encode()
                texts += [""] * len(encoded)
                ids += [self._byte_ids[byte] for byte in encoded]
            elif self._unknown_id is not None and not (ids and ids[-1] == self._unknown_id and not texts[-1]):
                texts.append("")
                ids.append(self._unknown_id)
        return texts, ids

    def _merge(self, segment: str) -> list[int]:
        """Merge the best pair until none is left. Ties: the longer left part, then the leftmost pair."""
        texts, ids = self._symbols(segment)
        count = len(texts)
        vocab, ranks = self._vocab, self._ranks
        after = list(range(1, count + 1))  # index of the next live symbol
        before = list(range(-1, count - 1))
        # (rank, -left length, -right length, merged id, left index, right index)
        heap: list[tuple[float, int, int, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if texts[left] and texts[right]:
                merged = vocab.get(texts[left] + texts[right])
                if merged is not None:
                    sizes = -len(texts[left]), -len(texts[right])
                    heapq.heappush(heap, (ranks[merged], *sizes, merged, left, right))

        for left in range(count - 1):
            offer(left, left + 1)
        while heap:
            _, left_size, right_size, merged, left, right = heapq.heappop(heap)
            if len(texts[left]) != -left_size or len(texts[right]) != -right_size:
                continue  # one of the two has been merged since
            texts[left] += texts[right]
            ids[left] = merged
            texts[right] = ""
            ids[right] = -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [token_id for token_id in ids if token_id >= 0]
