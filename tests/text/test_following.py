"""Text that follows other text: what is encoded piece by piece reads as what was written."""

from __future__ import annotations

import pytest

from octavo.text.tokenizer import Tokenizer
from tests.text.tiny import byte_level, scored

PIECES = ["Hello", ", how", " are", "you", " ", "<think>", "no space", "</s>", "x"]


@pytest.mark.parametrize("add_space_prefix", [False, True])
def test_no_space_comes_between_pieces(add_space_prefix: bool) -> None:
    """A tokenizer that puts a space before a text must put none before text that goes on."""
    tokenizer = Tokenizer.from_gguf(scored(1, add_space_prefix)[1])
    first = tokenizer.encode("Say:")
    assert first[0] == tokenizer.bos_token_id
    following = [tokenizer.encode_following(piece) for piece in PIECES]
    joined = [*first[1:], *(token_id for ids in following for token_id in ids)]
    assert tokenizer.decode(joined, skip_special_tokens=False) == "Say:" + "".join(PIECES)
    if add_space_prefix:
        assert tokenizer.encode_following("Hello") != tokenizer.encode("Hello", add_special_tokens=False)


def test_byte_level_has_nothing_to_leave_out() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("smollm")[1])
    for piece in PIECES:
        assert tokenizer.encode_following(piece) == tokenizer.encode(piece, add_special_tokens=False)
    assert tokenizer.encode_following("") == []
