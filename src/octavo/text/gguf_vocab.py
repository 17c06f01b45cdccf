"""Tokenizers from the ``tokenizer.*`` metadata of GGUF files.

Key names and token types are those of the GGUF specification (ggml, docs/gguf.md). Where a file leaves a choice open,
the outcome is that of transformers, which is that of the model's original tokenizer.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.text.added_tokens import AddedTokens, check_lengths
from octavo.text.byte_level import build_byte_level, byte_alphabet, pre_tokenizer_family
from octavo.text.score_bpe import SPACE, ScoreBPE
from octavo.text.token_bytes import BYTE_TOKEN, ToBytes, byte_level_bytes, sentencepiece_bytes
from octavo.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

KINDS = ("gpt2", "llama")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # token types; 5 is unused

MAX_TOKENS = 1 << 20  # the largest vocabularies have some 300,000
# Control tokens that end a turn or a text, by the names model families give them.
# fmt: off
_END_TOKENS = frozenset([
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>",
    "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_utterance>", "<turn|>", "<｜end▁of▁sentence｜>",
])
# fmt: on

_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the specification
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}


_TEMPLATE = "tokenizer.chat_template"


class _Metadata:
    """Checked access to the ``tokenizer.ggml.*`` keys."""

    def __init__(self, values: Mapping[str, Any], path: object) -> None:
        self._values = values
        self.path = path

    def error(self, key: str, message: str) -> ModelFormatError:
        return ModelFormatError(self.path, f"tokenizer.ggml.{key}", message)

    def get(self, key: str) -> Any:
        return self._values.get(f"tokenizer.ggml.{key}")

    def string(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.error(key, "missing" if value is None else f"expected a string, found {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            raise self.error(key, "missing")
        items = self._list(key, value)
        if not set(map(type, items)) <= {str}:
            raise self.error(key, "expected an array of strings")
        try:
            "".join(items).encode()
        except UnicodeEncodeError as error:  # a reader may hand invalid UTF-8 over as lone surrogates
            raise self.error(key, f"not valid UTF-8 near {error.object[error.start :][:20]!r}") from None
        return items

    def located(self, key: str) -> Any:
        """Strings that are decoded one by one, and know which of them occur in a text; None if they are not such."""
        value = self.get(key)
        return value.copied() if hasattr(value, "within") else None

    def pairs(self, key: str) -> list[tuple[str, ...]]:
        """Strings of two parts with a space between, taken apart: as many parts as there are."""
        value = self.get(key)
        found = value.to_pairs() if hasattr(value, "to_pairs") else None  # a lazy string array is several times faster
        # The byte alphabet has no white space, so splitting there is exact.
        return list(map(tuple, map(str.split, self.strings(key)))) if found is None else found

    def numbers(self, key: str, count: int) -> NDArray[Any] | None:
        """As many numbers as there are tokens, or None where the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"):
            items = self._list(key, value)
            if not set(map(type, items)) <= {int, float}:
                raise self.error(key, "expected an array of numbers")
            value = np.array(items)
        if len(value) != count:
            raise self.error(key, f"{len(value)} entries for {count} tokens")
        return value

    def _list(self, key: str, value: Any) -> list:
        if isinstance(value, (str, bytes)):
            raise self.error(key, "expected an array, found a string")
        try:
            for method in ("to_list", "tolist"):  # lazy string arrays; NumPy arrays
                if hasattr(value, method):
                    return getattr(value, method)()
            return list(value)
        except TypeError:
            raise self.error(key, f"expected an array, found {type(value).__name__}") from None

    def token_id(self, key: str, count: int) -> int | None:
        """None for an absent key, and with a warning for a number that is no token's: files say so of tokens that they
        do not have. Whoever needs the token asks for it."""
        value = self.get(key)
        if value is None:
            return None
        try:
            token_id = operator.index(value)
        except TypeError:
            token_id = None
        if token_id is None or isinstance(value, bool):
            raise self.error(key, f"expected a token id, found {str(value)[:40]!r}")
        if 0 <= token_id < count:
            return token_id
        self.warn("tokenizer.ggml.%s is %d and there are %d tokens: it is taken for absent", key, token_id, count)
        return None

    def warn(self, message: str, *values: object) -> None:
        log.warning(f"%s: {message}", self.path, *values)


def tokenizer_from_gguf(
    values: Mapping[str, Any], path: object = "GGUF metadata", *, is_sound: bool = False
) -> Tokenizer:
    """From the ``tokenizer.*`` keys of a GGUF file; `path` is for error messages. `is_sound`: the same metadata made a
    tokenizer before, so what makes one at once may wait until more than a few short texts are tokenised.

    String arrays are sequences of str (one with a ``to_list`` method is turned into a list by it), numeric arrays
    NumPy arrays or sequences. Raises UnsupportedModelError for a kind of tokenizer not implemented,
    ModelFormatError naming the key for missing or inconsistent metadata.
    """
    metadata = _Metadata(values, path)
    kind = metadata.string("model")
    if kind not in KINDS:
        raise UnsupportedModelError(f"{path}: tokenizer.ggml.model is {kind!r}; supported kinds: {', '.join(KINDS)}")
    tokens = metadata.located("tokens") if is_sound and kind == "gpt2" else None
    if tokens is None:
        is_sound, tokens = False, metadata.strings("tokens")
    if not len(tokens):
        raise metadata.error("tokens", "no tokens")
    if len(tokens) > MAX_TOKENS:  # each becomes several objects
        raise metadata.error("tokens", f"{len(tokens)} tokens; {MAX_TOKENS} are allowed")
    types = metadata.numbers("token_type", len(tokens))
    if types is None:
        metadata.warn("no tokenizer.ggml.token_type: only special tokens that the file names are told from text")
    ids = {name: metadata.token_id(key, len(tokens)) for name, key in _NAMED_IDS.items()}
    # Nearly all tokens are normal ones: these few are the rest.
    unusual = [] if types is None else [(n, types[n]) for n in np.flatnonzero(types != _NORMAL).tolist() if tokens[n]]
    special = {n for n, t in unusual if t in (_CONTROL, _UNKNOWN)}
    named = {name: token_id for name, token_id in ids.items() if token_id is not None and tokens[token_id]}
    special.update(named.values())
    user_defined = [n for n, t in unusual if t == _USER_DEFINED and n not in special]
    try:
        check_lengths(tokens[n] for n in [*user_defined, *special])
    except ValueError as error:
        raise metadata.error("tokens", str(error)) from None
    named_texts = {name: tokens[token_id] for name, token_id in named.items()}

    build: Any = _build_byte_level if kind == "gpt2" else _build_scored
    if is_sound:
        build = _build_byte_level_as_needed
    encode, to_bytes, strip, add_bos = build(metadata, values, tokens, types, special, user_defined, ids["unk_token"])
    return Tokenizer(
        encode=_with_ends(metadata, encode, ids["bos_token"], ids["eos_token"], add_bos),
        token_text=lambda token_id: tokens[token_id] if token_id < len(tokens) else None,
        to_bytes=to_bytes,
        vocab_size=len(tokens),
        special_token_ids=special,
        special_tokens=named_texts,
        bos_token_id=ids["bos_token"],
        eos_token_ids=_end_tokens(metadata, tokens, special, ids["eos_token"]),
        strip_leading_space=strip,
        chat_templates=_chat_templates(values, path),
    )


def _end_tokens(metadata: _Metadata, tokens: list[str], special: set[int], eos: int | None) -> set[int]:
    ids = [eos, *(metadata.token_id(key, len(tokens)) for key in ("eot_token_id", "eom_token_id"))]
    ends = {token_id for token_id in ids if token_id is not None}
    return ends | {token_id for token_id in special if tokens[token_id] in _END_TOKENS}


def _chat_templates(values: Mapping[str, Any], path: object) -> dict[str, str]:
    """``tokenizer.chat_template`` is the default, ``tokenizer.chat_template.NAME`` are others."""
    templates = {}
    for key, value in values.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(value, str):
                raise ModelFormatError(path, key, f"expected a string, found {type(value).__name__}")
            templates[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = value
    return templates


def _with_ends(
    metadata: _Metadata, encode: Callable[[str], list[int]], bos: int | None, eos: int | None, default_bos: bool
) -> Callable[[str, bool], list[int]]:
    """`encode` with BOS and EOS around, as the file asks."""
    given = metadata.get("bos_token_id")
    add_bos = metadata.flag("add_bos_token", default_bos and given is not None)
    add_eos = metadata.flag("add_eos_token", False)
    if add_bos and bos is None and given is not None:
        raise metadata.error("bos_token_id", f"{given} is not a token id, and is to be put before every text")
    if add_bos and bos is None:
        raise metadata.error("add_bos_token", "true, but there is no tokenizer.ggml.bos_token_id")
    if add_eos and eos is None:
        raise metadata.error("add_eos_token", "true, but there is no tokenizer.ggml.eos_token_id of a token")
    before = [bos] if add_bos and bos is not None else []
    after = [eos] if add_eos and eos is not None else []

    def encode_with_ends(text: str, add_special_tokens: bool) -> list[int]:
        ids = encode(text)
        return [*before, *ids, *after] if add_special_tokens else ids

    return encode_with_ends


def _vocab(metadata: _Metadata, tokens: list[str]) -> dict[str, int]:
    """Token text -> id. Empty tokens, which some files have as padding, are no part of it: no text can hold them."""
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        twice = next((text for n, text in enumerate(tokens) if text and vocab[text] != n), None)
        if twice is not None:
            raise metadata.error("tokens", f"token {twice!r} occurs more than once")
    vocab.pop("", None)
    return vocab


# Bytes of a text for which only the tokens in it are looked for, and how many such texts. It takes a tenth of the time
# that the whole vocabulary takes.
_SHORT, _FEW = 2048, 3

_Built = tuple[Callable[[str], list[int]], ToBytes, bool, bool]  # encode, to_bytes, strip leading space, BOS by default


def _build_byte_level(
    metadata: _Metadata,
    _values: Mapping[str, Any],
    tokens: list[str],
    _types: NDArray[Any] | None,
    special: set[int],
    user_defined: list[int],
    _unknown: int | None,
) -> _Built:
    if metadata.get("pre") is None:
        metadata.warn(
            "no tokenizer.ggml.pre: it does not say how text is split before it is tokenised. GPT-2's way is taken; "
            "Llama 3, Qwen 2 and most later models split otherwise, and then answers are worse. A file converted by "
            "llama.cpp of May 2024 or later says it"
        )
    family = pre_tokenizer_family(metadata.string("pre", "default"))
    merges = metadata.pairs("merges")
    added = {"special": [tokens[n] for n in sorted(special)], "user_defined": [tokens[n] for n in user_defined]}
    tokenizer = build_byte_level(_vocab(metadata, tokens), merges, family, **added, path=metadata.path)

    def encode(text: str) -> list[int]:
        # As a batch of one: other threads run meanwhile, and no offsets are made, which take as long again.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode, byte_level_bytes(special.union(user_defined)), False, family == "llama-bpe"


def _build_byte_level_as_needed(
    metadata: _Metadata, values: Mapping[str, Any], tokens: Any, types: Any, special: set[int], *rest: Any
) -> _Built:
    """The same of metadata that is known to be sound. A few short texts are tokenised with the part of the vocabulary
    that they can have: merging never makes a token that is not in the text, so the others change nothing."""
    user_defined, _ = rest
    merges = metadata.located("merges")
    if merges is None:
        return _build_byte_level(metadata, values, metadata.strings("tokens"), types, special, *rest)
    family = pre_tokenizer_family(metadata.string("pre", "default"))
    added = {"special": [tokens[n] for n in sorted(special)], "user_defined": [tokens[n] for n in user_defined]}
    spelt = {byte: char for char, byte in byte_alphabet().items()}
    whole: list[Callable[[str], list[int]]] = []
    left = iter(range(_FEW))
    lock = Lock()

    def encode(text: str) -> list[int]:
        data = text.encode()
        if not whole and len(data) <= _SHORT and next(left, None) is not None:
            letters = "".join(spelt[byte] for byte in data).encode()
            ids = {*tokens.within(letters), *special, *user_defined}
            vocab = {tokens[n]: n for n in sorted(ids) if tokens[n]}
            chosen = [tuple(merges[n].split(" ")) for n in merges.within(letters, pairs=True)]
            part = build_byte_level(vocab, chosen, family, **added, path=metadata.path)
            return part.encode_batch_fast([text], add_special_tokens=False)[0].ids
        with lock:
            if not whole:
                built = _build_byte_level(metadata, values, metadata.strings("tokens"), types, special, *rest)
                whole.append(built[0])
        return whole[0](text)

    return encode, byte_level_bytes(special.union(user_defined)), False, family == "llama-bpe"


def _build_scored(
    metadata: _Metadata,
    values: Mapping[str, Any],
    tokens: list[str],
    types: NDArray[Any] | None,
    special: set[int],
    user_defined: list[int],
    unknown: int | None,
) -> _Built:
    scores = metadata.numbers("scores", len(tokens))
    if scores is None:
        raise metadata.error("scores", "missing")
    if not np.isfinite(scores).all():
        raise metadata.error("scores", "every score must be finite")
    gemma = str(values.get("general.architecture", "")).startswith("gemma")
    if gemma:
        # Gemma's runs of spaces are spelled with real spaces and carry a score that is not their place among the
        # merges (their position is). They are ordinary tokens of its original tokenizer, found by merging and not in
        # the raw text.
        spaces = [n for n in user_defined if not tokens[n].strip(" ")]
        tokens = list(tokens)
        for n in spaces:
            tokens[n] = SPACE * len(tokens[n])
        user_defined = [n for n in user_defined if n not in set(spaces)]
        ranks: Any = range(len(tokens))
    else:
        ranks = (-scores).tolist()
    byte_ids = _byte_ids(metadata, tokens, types)
    if byte_ids is None and unknown is None:
        message = "there are neither 256 byte tokens nor a tokenizer.ggml.unknown_token_id: not every text has tokens"
        raise metadata.error("token_type", message)
    add_space_prefix = metadata.flag("add_space_prefix", True)
    added = AddedTokens({tokens[n]: n for n in [*user_defined, *special]})
    vocab = _vocab(metadata, tokens)
    # As in SentencePiece, merging never makes one of these: the text "<0x41>" is not the byte 0x41.
    for n in [*special, *(byte_ids or ())]:
        vocab.pop(tokens[n], None)
    encoder = ScoreBPE(vocab, ranks, added, byte_ids, unknown, add_space_prefix)
    return encoder.encode, sentencepiece_bytes(frozenset(byte_ids or ())), add_space_prefix, True


def _byte_ids(metadata: _Metadata, tokens: list[str], types: NDArray[Any] | None) -> list[int] | None:
    """The ids of the byte tokens, by byte; None where there are not all 256."""
    by_byte: dict[int, int] = {}
    for token_id in range(len(tokens)) if types is None else np.flatnonzero(types == _BYTE).tolist():
        text = tokens[token_id]
        match = BYTE_TOKEN.fullmatch(text)
        if match:
            by_byte[int(match[1], 16)] = token_id
        elif types is not None:
            raise metadata.error("token_type", f"token {token_id} is marked as a byte but spelled {text!r}")
    return [by_byte[byte] for byte in range(256)] if len(by_byte) == 256 else None
