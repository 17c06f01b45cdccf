"""Text to token ids and back, for one model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from octavo.core.errors import InvalidRequestError, shown
from octavo.text.added_tokens import AddedTokens
from octavo.text.library import MAX_TEXT_BYTES, LibraryError, called
from octavo.text.stream import IncrementalText, StopMatcher
from octavo.text.token_bytes import ToBytes

# Tokens at the end of a text that are looked at when it goes on: several words, and so more than any token spans.
_CONTEXT_TOKENS = 64
# Texts to stand before another one, each of a kind of character that tokenizers keep from joining with other kinds.
_BORDERS = ("\n", ".", "a", "0", "\u4e00")


class Tokenizer:
    """Made by `gguf_vocab.tokenizer_from_gguf` and `directory.tokenizer_from_directory`. Safe to share by threads.

    Decoding joins the bytes of the tokens and reads them as UTF-8, each maximal invalid part becoming one U+FFFD, as
    the Unicode standard recommends. On valid text that is what transformers gives; on a broken run of SentencePiece
    byte tokens transformers gives one U+FFFD per byte of the whole run, valid characters in it included.
    """

    def __init__(
        self,
        *,
        encode: Callable[[str, bool], list[int]],
        token_text: Callable[[int], str | None],
        to_bytes: ToBytes,
        vocab_size: int,
        special_token_ids: Collection[int],
        special_tokens: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: Collection[int],
        strip_leading_space: bool,
        chat_templates: Mapping[str, str],
    ) -> None:
        """`encode`: (text, add special tokens) -> ids. `token_text`: id -> its spelling in the vocabulary, None where
        there is none. `special_tokens`: names such as ``"bos_token"`` -> text, for chat templates.
        `strip_leading_space`: the tokenizer puts a space before text, so decoding takes one away. `chat_templates`: by
        name, a model's only one as "default".
        """
        self._encode = encode
        self._token_text = token_text
        self._to_bytes = to_bytes
        self._vocab_size = vocab_size
        self._special_token_ids = frozenset(special_token_ids)
        self._special_tokens = dict(special_tokens)
        self._bos_token_id = bos_token_id
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._strip_leading_space = strip_leading_space
        self._chat_templates = dict(chat_templates)
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met
        self._special_texts: AddedTokens | None = None  # made when first asked for

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id. The model may have more rows; those ids have no text."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends generation, ascending.

        From a directory: those of ``generation_config.json`` (or ``config.json``) and the tokenizer's own. From GGUF:
        the eos, eot and eom ids, and control tokens with a well-known end-of-turn or end-of-text name, as llama.cpp
        has it: for SmolLM2 that is 0 (``<|endoftext|>``) and 2 (``<|im_end|>``).
        """
        return self._eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of decoded text."""
        return self._special_token_ids

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, such as ``{"bos_token": "<s>"}``: variables of the chat template."""
        return dict(self._special_tokens)

    @property
    def chat_template(self) -> str | None:
        """Source of the model's chat template (see `octavo.text.chat_template`) for all conversations, if any."""
        return self._chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """All of them by name: "default" and, where a model has several, such as "tool_use"."""
        return dict(self._chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised either way.

        `add_special_tokens` adds BOS and EOS as the model asks. Leave it off for the output of a chat template, which
        writes them itself. Raises InvalidRequestError (field ``prompt``) for a lone surrogate, for a text of more than
        8 MiB, and where the model's tokenizer fails on the text.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InvalidRequestError(
                "prompt", f"lone surrogate U+{code:04X} at character {error.start}; text must be valid Unicode"
            ) from None
        if size > MAX_TEXT_BYTES:
            raise InvalidRequestError("prompt", f"has {size} bytes of text; {MAX_TEXT_BYTES} are tokenised at most")
        try:
            return called(self._encode, text, add_special_tokens)
        except LibraryError as error:
            raise InvalidRequestError("prompt", f"this model's tokenizer fails on the text: {error}") from None

    def encode_open(self, text: str) -> list[int]:
        """Token ids of a text that goes on later: with what the model asks for before it, such as BOS, and without
        what would come after its end, such as EOS."""
        plain = self.encode(text, add_special_tokens=False)
        ids = self.encode(text)
        before = next((n for n in range(len(ids)) if ids[n : n + len(plain)] == plain), 0)
        return ids[: before + len(plain)]

    def encode_following(self, before: Sequence[int], text: str, *, plain: bool = False) -> list[int]:
        """Token ids of `text` where the tokens `before` stand before it: those of the whole text that come after
        those of its beginning, with nothing that a tokenizer puts before a text as such.

        Where the whole text would have a token that crosses the border (``before`` ends in "wh", `text` is "ale"),
        that is `encode_inside`. The last tokens of `before` decide:
        what lies further back is not looked at, so the time does not depend on its length. `plain`: special tokens
        written out in the text are text, as in `encode_plain`.
        """
        if not text:
            return []
        if plain and len(pieces := self._plain_pieces(text)) > 1:
            first = self.encode_following(before, pieces[0])
            return first + [token_id for piece in pieces[1:] for token_id in self.encode_inside(piece)]
        if not before or list(before) == self.encode(""):  # it is the beginning
            return self.encode(text, add_special_tokens=False)
        found = self._after(self.spelling(before[-_CONTEXT_TOKENS:]), text)
        return self.encode_inside(text) if found is None else found

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of `text` inside a text that has a border of tokens before it, with nothing put before it."""
        ids = self.encode(text, add_special_tokens=False)
        if self.spelling(ids) in (text, text.replace("\u2581", " ")):
            return ids  # nothing was put before it
        return next((found for border in _BORDERS if (found := self._after(border, text)) is not None), ids)

    def encode_plain(self, text: str) -> list[int]:
        """`encode_inside`, but special tokens written out in the text are text as well: what strangers wrote can end no
        message and begin none."""
        return [token_id for piece in self._plain_pieces(text) for token_id in self.encode_inside(piece)]

    def _plain_pieces(self, text: str) -> list[str]:
        """The text, cut inside each special token that it spells out."""
        pieces = [""]
        for part, token_id in self._specials.split(text):
            if token_id < 0 or len(part) == 1:  # which cannot be cut
                pieces[-1] += part
            else:
                pieces[-1] += part[0]
                pieces.append(part[1:])
        if len(pieces) == 1:
            return pieces
        # What is left of one may begin or hold another.
        return [smaller for piece in pieces for smaller in self._plain_pieces(piece)]

    def _after(self, beginning: str, text: str) -> list[int] | None:
        """The tokens of `beginning + text` less those of `beginning`; None where these are not what it begins with."""
        first = self.encode(beginning, add_special_tokens=False)
        whole = self.encode(beginning + text, add_special_tokens=False)
        return whole[len(first) :] if whole[: len(first)] == first else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes token `token_id` adds to a text, special tokens spelled out. Empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            if token_id < 0:
                raise InvalidRequestError("token_ids", f"{shown(token_id)} is not a token id")
            text = self._token_text(token_id) if token_id < self._vocab_size else None
            known = b"" if text is None else self._to_bytes(text, token_id)
            if token_id < self._vocab_size:
                self._bytes[token_id] = known
        return known

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Incomplete or invalid UTF-8 becomes U+FFFD."""
        skipped = self._special_token_ids if skip_special_tokens else frozenset()
        data = b"".join([self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        if self._strip_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def spelling(self, token_ids: Sequence[int]) -> str:
        """Text of tokens from the middle of a text: special ones spelt out, and no leading space taken away."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def text_stream(
        self,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop_after: int = 0,
    ) -> IncrementalText:
        """Incremental text of one output that follows `prompt_token_ids`; see `IncrementalText`.

        A stop string that is a special token is found also where special tokens are skipped.

        `spaces_between_special_tokens` is accepted for compatibility: none of the tokenizers supported puts spaces
        there, nor do the fast tokenizers of transformers, so both values give the same text.
        """
        del spaces_between_special_tokens
        return IncrementalText(
            token_bytes=self.token_bytes,
            skipped=self._special_token_ids if skip_special_tokens else frozenset(),
            strip_leading_space=self._strip_leading_space,
            prompt_token_ids=prompt_token_ids,
            stop=StopMatcher(stop) if stop else None,
            include_stop=include_stop_str_in_output,
            stop_after=stop_after,
            stop_tokens=frozenset(n for string in stop for n in self.special_tokens_in(string)),
        )

    def special_tokens_in(self, text: str) -> list[int]:
        """The special tokens that `text` spells out, also where the tokenizer would take them for ordinary text."""
        return [n for _, n in self._specials.split(text) if n >= 0]

    @property
    def _specials(self) -> AddedTokens:
        if self._special_texts is None:
            ids = {self.spelling([n]): n for n in sorted(self._special_token_ids)}
            ids.pop("", None)
            self._special_texts = AddedTokens(ids)
        return self._special_texts
