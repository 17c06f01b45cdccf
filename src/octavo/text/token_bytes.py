"""The exact bytes each token stands for, by the two spellings vocabularies use."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from octavo.text.byte_level import byte_alphabet
from octavo.text.score_bpe import SPACE

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

ToBytes = Callable[[str, int], bytes]


def byte_level_bytes(verbatim: Collection[int]) -> ToBytes:
    """For byte-level vocabularies: each character stands for a byte. Tokens in `verbatim` (added ones) are plain text,
    as is any token with a character that stands for no byte.
    """
    alphabet = byte_alphabet()

    def to_bytes(text: str, token_id: int) -> bytes:
        if token_id not in verbatim:
            try:
                return bytes([alphabet[char] for char in text])
            except KeyError:
                pass
        return text.encode()

    return to_bytes


def sentencepiece_bytes(byte_tokens: Collection[int] | None) -> ToBytes:
    """For SentencePiece-style vocabularies: U+2581 is a space, and ``<0xHH>`` is a byte for the ids in `byte_tokens`
    (all tokens of that form where it is None).
    """

    def to_bytes(text: str, token_id: int) -> bytes:
        if (byte_tokens is None or token_id in byte_tokens) and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.replace(SPACE, " ").encode()

    return to_bytes
