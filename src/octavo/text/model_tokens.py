"""A tokenizer beside the rows of a model: it may know tokens that the model has none for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.core.errors import InvalidRequestError, shown
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.core.grammar import GrammarState
    from octavo.core.structured import StructuredOutputsParams
    from octavo.text.grammars import Grammars

# Characters of text that a cut may change the tokens of: those of one long token, or of one text that is replaced.
_CUT = 4096
_MAX_BAD_WORDS = 1 << 16  # characters of all together: each is tokenised in several ways


class ModelTokens:
    """What requests spell, in tokens that one model can read and draw. Implements `octavo.core.protocols.TextCodec`."""

    def __init__(self, codec: Tokenizer, rows: int) -> None:
        """`rows`: of the model's embedding, for token ids from 0 on."""
        self._codec = codec
        self._rows = rows
        # Files name end tokens without a row: they can never be drawn.
        self.eos_token_ids = tuple(n for n in codec.eos_token_ids if n < rows)
        self.text_stream = codec.text_stream
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def check_spelt(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuse a text by the name of the first of its tokens that has no row. Raises InvalidRequestError."""
        for token_id in token_ids:
            if token_id >= self._rows:
                token, last = self._codec.spelling([token_id]), self._rows - 1
                problem = f"holds {token!r}, token {token_id}, which this model does not know: its ids end at {last}"
                raise InvalidRequestError(field, problem)

    def check_beginning(self, field: str, text: str, most: int) -> None:
        """Refuse a text by its beginning if that alone has far more than `most` tokens: time and memory are then
        those of the tokens that are allowed, however long the text. Raises InvalidRequestError.

        A text of `most` tokens is never refused: where it is cut, tokens may be others than in the whole, but not
        twice as many; spaces at the cut, which a token after them may swallow, do not count.
        """
        looked = 8 * most + _CUT
        while len(text) > looked:
            found = len(self._codec.encode(text[:looked].rstrip(), add_special_tokens=False))
            if found > 2 * most + _CUT:
                problem = f"its first {looked} characters have {found} tokens, and there are {len(text)} characters"
                raise InvalidRequestError(field, f"{problem}; max_model_len is {most}")
            looked *= 2

    def encode_rest(self, before: Sequence[int], text: str) -> list[int]:
        """Token ids of what is left of a token that was cut, without any that has no row."""
        return [n for n in self._codec.encode_following(before, text) if n < self._rows]

    def encode_around(self, before: Sequence[int], head: str, plain: str, tail: str) -> list[int]:
        """Of a text of three parts. In the second, special tokens written out are text; borders are round it then."""
        if not self._codec.special_tokens_in(plain):
            return self.encode_rest(before, head + plain + tail)
        token_ids = self._codec.encode_following(before, head)
        token_ids += self._codec.encode_plain(plain)
        token_ids += self._codec.encode_inside(tail) if tail else []
        return [n for n in token_ids if n < self._rows]

    def grammar_state(self, params: StructuredOutputsParams) -> GrammarState:
        """Where an output begins. Raises InvalidRequestError."""
        return self.grammars.state(params)

    @property
    def grammars(self) -> Grammars:
        with self._lock:
            if self._grammars is None:
                from octavo.text.grammars import Grammars

                self._grammars = Grammars(self._codec, self.eos_token_ids, self._rows)
            return self._grammars

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, as it is spelt at the start of a text, inside one, and there after a space; but for
        spellings with a token that has no row, which cannot be drawn."""
        if (size := sum(map(len, words))) > _MAX_BAD_WORDS:
            problem = f"have {size} characters together; {_MAX_BAD_WORDS} are allowed"
            raise InvalidRequestError("bad_words", problem)
        spellings: dict[tuple[int, ...], None] = {}
        for word in words:
            try:
                at_start = self._codec.encode(word, add_special_tokens=False)
                inside = self._codec.encode_inside(word)
                spaced = self._codec.encode_inside(" " + word.lstrip())
            except InvalidRequestError as error:
                raise InvalidRequestError("bad_words", error.problem) from None
            for token_ids in (at_start, inside, spaced):
                if token_ids and max(token_ids) < self._rows:
                    spellings[tuple(token_ids)] = None
        return tuple(spellings)

    def check_stop(self, text: str) -> None:
        """Of a request whose texts leave special tokens out: alone these can stop it, inside a string they cannot be
        found. Raises InvalidRequestError."""
        for token_id in self._codec.special_tokens_in(text):
            token = self._codec.spelling([token_id])
            if token != text:
                problem = f"{shown(text)} holds the special token {token}, which skip_special_tokens leaves out"
                raise InvalidRequestError("stop", f"{problem}: give the token alone, or skip_special_tokens=False")
