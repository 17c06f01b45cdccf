"""Byte-level BPE: the byte alphabet of GPT-2 and the pre-tokenizers that GGUF files name in ``tokenizer.ggml.pre``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.text.library import LibraryError, called

if TYPE_CHECKING:
    import tokenizers


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, as character -> byte (256 entries).

    Printable Latin-1 characters stand for themselves; the other bytes take the code points from U+0100 up, in byte
    order (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: GPT-2's encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return alphabet


# Contractions, words with at most one leading other character, digit groups, punctuation, newlines, spaces. The two
# families differ in how long a group of digits may be.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Pre-tokenizer names of GGUF files -> family. "default" (or none named) is what transformers makes of such a file:
# GPT-2's.
PRE_TOKENIZERS = {
    "default": "gpt-2",
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "stablelm2": "qwen2",
    "hunyuan": "qwen2",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def pre_tokenizer_family(name: str) -> str:
    """The family of a ``tokenizer.ggml.pre`` name. Raises UnsupportedModelError listing the known names."""
    family = PRE_TOKENIZERS.get(name)
    if family is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre is {name!r}; supported pre-tokenizers: {known}")
    return family


def build_byte_level(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, ...]],
    family: str,
    special: Sequence[str],
    user_defined: Sequence[str],
    path: object,
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer.

    `vocab` maps token text (in the byte alphabet) to id; `merges` are (left, right), best first; `special` and
    `user_defined` are tokens found whole in the text before anything else is done to it.
    Raises ModelFormatError naming ``tokenizer.ggml.merges`` where a merge is malformed or names an absent token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    # Llama 3 has tokens that its merges cannot reach: a pre-token that is in the vocabulary is taken whole.
    ignore_merges = family == "llama-bpe"
    try:
        model = called(models.BPE, vocab, cast("list[tuple[str, str]]", merges), ignore_merges=ignore_merges)
    except LibraryError as error:  # a token out of vocabulary
        raise ModelFormatError(path, "tokenizer.ggml.merges", _explain(vocab, merges, error)) from None
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family in ("gpt-2", "smollm"))
    first: pre_tokenizers.PreTokenizer | None = None
    if family == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    elif family != "gpt-2":
        digits = "{1,3}" if family == "llama-bpe" else ""
        first = pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated")
    tokenizer.pre_tokenizer = byte_level if first is None else pre_tokenizers.Sequence([first, byte_level])
    try:
        called(tokenizer.add_special_tokens, [AddedToken(text, normalized=False, special=True) for text in special])
        called(tokenizer.add_tokens, [AddedToken(text, normalized=False) for text in user_defined])
    except LibraryError as error:
        raise ModelFormatError(path, "tokenizer.ggml.tokens", str(error)) from None
    return tokenizer


def _explain(vocab: dict[str, int], merges: Sequence[tuple[str, ...]], error: Exception) -> str:
    """The first merge at fault, in words."""
    for index, pieces in enumerate(merges):
        merge = " ".join(pieces)
        if len(pieces) != 2:
            return f"merge {index} is {merge!r}; expected two tokens with a space between"
        for token in (*pieces, "".join(pieces)):
            if token not in vocab:
                return f"merge {index} is {merge!r}, but {token!r} is not a token"
    return str(error)
