"""Tokens that ``tokenizer_config.json`` and the small files beside it add to a ``tokenizer.json``.

What counts, and what goes before what, is as in transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ModelFormatError

if TYPE_CHECKING:
    import tokenizers

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def add_config_tokens(
    path: Path, fast: tokenizers.Tokenizer, config: dict[str, Any], read: Callable[[str], dict[str, Any]]
) -> dict[str, str]:
    """Add to `fast` the tokens that only its configuration knows, and mark those that it calls special.

    `read` gives the JSON object in a file, empty without one. Returns the named special tokens, such as ``bos_token``
    -> text. Raises ModelFormatError naming the file and key.
    """
    from tokenizers import AddedToken

    files = dict.fromkeys(config, _CONFIG)
    listed = config.get("added_tokens_decoder")
    if listed is None:  # as older versions of transformers wrote it
        of_map = {key: value for key, value in read(_MAP).items() if value is not None}
        config, files = config | of_map, files | dict.fromkeys(of_map, _MAP)
    named = {key: _token(path, f"{files[key]}: {key}", value, special=True) for key, value in _named(config)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    field = f"{_CONFIG}: extra_special_tokens"
    if isinstance(extra, dict):  # by name
        if not all(key.isidentifier() and key.endswith("_token") for key in extra):
            raise ModelFormatError(path, field, f"names must end in _token, unlike some of {', '.join(extra)}")
        named |= {key: _token(path, f"{field}.{key}", value, special=True) for key, value in extra.items()}
        extra = []
    if not isinstance(extra, list):
        raise ModelFormatError(path, field, f"expected a list or an object, found {extra!r}")
    more = [*named.values(), *(_token(path, field, value, special=True) for value in extra)]
    texts = {token.content for token in named.values()}

    field = f"{_CONFIG}: added_tokens_decoder"
    present = fast.get_added_tokens_decoder()
    written = {token_id: repr(token) for token_id, token in present.items()}
    by_id = {} if listed is None else dict(_by_id(path, field, listed))
    if listed is None:
        field = "added_tokens.json"
        for text, token_id in read(field).items():
            is_special = text in texts or text in extra
            by_id[_checked_id(path, field, token_id)] = AddedToken(text, normalized=not is_special, special=is_special)
        by_id |= present
    for token in by_id.values():
        token.special |= token.content in texts
    # Most stand there already, and adding thousands takes its time.
    tokens = [by_id[token_id] for token_id in sorted(by_id) if repr(by_id[token_id]) != written.get(token_id)]
    known = {token.content for token in (*by_id.values(), *present.values())}
    fast.add_tokens([*tokens, *(token for token in more if token.content not in known)])
    for token_id, token in by_id.items():
        found = fast.token_to_id(token.content)
        if found != token_id:
            raise ModelFormatError(path, field, f"{token.content!r} is {token_id} there, and {found} in tokenizer.json")
    return {name: token.content for name, token in named.items()}


def _named(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The named special tokens: the usual ones, and whatever else is called so and is a token."""
    for key in _NAMED:
        if config.get(key) is not None:
            yield key, config[key]
    for key, value in config.items():
        if key.isidentifier() and key.endswith("_token") and key not in _NAMED and isinstance(value, str | dict):
            yield key, value


def _by_id(path: Path, field: str, listed: Any) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    if not isinstance(listed, dict):
        raise ModelFormatError(path, field, f"expected an object, found {type(listed).__name__}")
    for key, value in listed.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else None
        yield _checked_id(path, field, key if token_id is None else token_id), _token(path, f"{field}.{key}", value)


def _checked_id(path: Path, field: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ModelFormatError(path, field, f"expected a token id, found {value!r}")
    return value


def _token(path: Path, field: str, value: Any, special: bool = False) -> tokenizers.AddedToken:
    """A token written as its text, or as an object with a ``content`` and flags."""
    from tokenizers import AddedToken

    flags = {key: item for key, item in value.items() if key != "__type"} if isinstance(value, dict) else {}
    text = flags.pop("content", None) if isinstance(value, dict) else value
    flags = {"normalized": False} | flags | {"special": True} if special else flags
    if isinstance(text, str) and text:
        try:
            return AddedToken(text, **flags)
        except TypeError:
            pass
    raise ModelFormatError(path, field, f"expected the text of a token, or an object with it, found {value!r}")
