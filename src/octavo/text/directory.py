"""Tokenizers from Hugging Face directories. Only data is read; no code there is ever run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError, ModelFormatError, ModelNotFoundError, UnsupportedModelError, shown
from octavo.core.model_folder import read_file, read_object
from octavo.text.added_tokens import check_lengths
from octavo.text.config_tokens import add_config_tokens
from octavo.text.library import MAX_TEXT_BYTES, LibraryError, called
from octavo.text.regex_shape import MAX_RUN, trial_texts
from octavo.text.token_bytes import ToBytes, byte_level_bytes, sentencepiece_bytes
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_spec import TokenizerSpec, read_spec

if TYPE_CHECKING:
    import tokenizers

_MORE_TEMPLATES = "additional_chat_templates"
# Of every kind of character that tokenizers tell apart, and of each length in UTF-8.
_PROBES = (
    "",
    " ",
    "a",
    "Hello, world! 123\n\n  \t'll",
    "\u00e9\u0301 \u4e2d\u6587 \ud55c \u0e01 \u05d0 \ufdfa",
    "\U0001f600\u200d\U0010ffff\x00\x01",
)
_MAX_CONFIG_BYTES = 32 << 20  # of one JSON file: of one that lists 65,536 tokens of speech, 12 MiB
_MAX_TEMPLATE_BYTES, _MAX_TEMPLATES = 1 << 20, 64  # of templates in files of their own


def tokenizer_from_directory(path: str | Path) -> Tokenizer:
    """From ``tokenizer.json`` and the small JSON files beside it.

    Raises ModelNotFoundError without a ``tokenizer.json``, ModelFormatError for a malformed file,
    UnsupportedModelError for a decoder not implemented.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: no such directory")
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelNotFoundError(
            f"{path}: no tokenizer.json there; only Hugging Face fast tokenizers and GGUF files are read"
        )
    spec, data = read_spec(path, file.name)
    try:
        return called(_load, path, spec, data)
    except LibraryError as error:
        raise ModelFormatError(path, "tokenizer.json", str(error)) from None


def _load(path: Path, spec: TokenizerSpec, data: bytes) -> Tokenizer:
    """Raises whatever the library raises."""
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_buffer(data)
    fast.no_truncation()
    fast.no_padding()
    config = _read_json(path, "tokenizer_config.json")
    named = add_config_tokens(path, fast, config, lambda name: _read_json(path, name))
    fast.encode_special_tokens = _flag(path, config, "split_special_tokens")
    added = fast.get_added_tokens_decoder()
    _try(path, fast, spec)
    to_bytes, strip = _decoder(path, fast, frozenset(added))
    bos = fast.token_to_id(named["bos_token"]) if "bos_token" in named else None
    eos = fast.token_to_id(named["eos_token"]) if "eos_token" in named else None
    vocab_size = 1 + max([spec.max_token_id, *added])
    check_lengths(token.content for token in added.values())
    runs = [re.compile(rf"{run}{{{MAX_RUN + 1}}}") for run in spec.runs]

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        if not spec.takes(text):  # where memory runs out the library ends the process
            problem = f"normalised by this model's tokenizer it may have more than {MAX_TEXT_BYTES} bytes"
            raise InvalidRequestError("prompt", f"{problem}, which are most: it has {len(text)} characters")
        for run in runs:
            if run.search(text):
                problem = f"this model's tokenizer takes no text with a run of more than {MAX_RUN} of {run.pattern[:2]}"
                raise InvalidRequestError("prompt", problem)
        # BOS and EOS are the business of tokenizer.json's post-processor. The flags add_bos_token and add_eos_token of
        # tokenizer_config.json do not count beside it, nor do they in transformers.
        # As a batch of one: other threads run meanwhile, and no offsets are made, which take as long again.
        return fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    return Tokenizer(
        encode=encode,
        token_text=fast.id_to_token,
        to_bytes=to_bytes,
        vocab_size=vocab_size,
        special_token_ids=[token_id for token_id, token in added.items() if token.special],
        special_tokens=named,
        bos_token_id=bos,
        eos_token_ids=_end_tokens(path, eos),
        strip_leading_space=strip,
        chat_templates=_chat_templates(path, config),
    )


def _try(path: Path, fast: tokenizers.Tokenizer, spec: TokenizerSpec) -> None:
    """Encode texts of all kinds, and such as an expression in the file may take too long for. Raises
    ModelFormatError."""
    for text in (*_PROBES, *(text for pattern in spec.patterns for text in trial_texts(pattern))):
        try:
            called(fast.encode, text)
        except LibraryError as error:
            field = "tokenizer.json"
            raise ModelFormatError(path, field, f"it fails on texts such as {shown(text)}: {error}") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    return read_object(path, name, _MAX_CONFIG_BYTES)


def _flag(path: Path, config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelFormatError(path, f"tokenizer_config.json: {name}", f"expected true or false, found {value!r}")
    return bool(value)


def _decoder(path: Path, fast: tokenizers.Tokenizer, added: frozenset[int]) -> tuple[ToBytes, bool]:
    """How tokens become bytes, and whether a space is taken from the front of the text, by the decoder of
    tokenizer.json.
    """
    decoder: Any = fast.decoder
    spec: Any = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes(added), False
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces and steps[3:] in ([], [strip]):
        return sentencepiece_bytes(None), bool(steps[3:])
    raise UnsupportedModelError(
        f"{path}: tokenizer.json has the decoder {' + '.join(map(str, kinds))}; supported: ByteLevel, "
        "and Replace + ByteFallback + Fuse with an optional Strip of one leading space"
    )


def _end_tokens(path: Path, eos: int | None) -> set[int]:
    """The tokenizer's own, and those of the generation config (or, without one, of the model config)."""
    ends = set() if eos is None else {eos}
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path, name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise ModelFormatError(
                path, f"{name}: eos_token_id", f"expected a token id or a list of them, found {value!r}"
            )
        return ends.union(ids)
    return ends


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files go before what the JSON files say: ``chat_template.jinja`` is the default, those in
    ``additional_chat_templates`` have their names; then ``chat_template.json``, then ``tokenizer_config.json``."""
    texts = {"default": _read_text(path, "chat_template.jinja")}
    files = sorted((path / _MORE_TEMPLATES).glob("*.jinja"))
    if len(files) > _MAX_TEMPLATES:
        raise ModelFormatError(path, _MORE_TEMPLATES, f"has {len(files)} templates; {_MAX_TEMPLATES} are allowed")
    for file in files:
        texts[file.stem] = _read_text(path, file.name, _MORE_TEMPLATES)
    found = {name: text for name, text in texts.items() if text is not None}
    if found:
        return found
    of_processor = _read_json(path, "chat_template.json").get("chat_template")
    name = "tokenizer_config.json" if of_processor is None else "chat_template.json"
    value = config.get("chat_template") if of_processor is None else of_processor
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in (*named, *named.values())):
        message = "expected a string, an object of named templates, or a list of objects with name and template"
        raise ModelFormatError(path, f"{name}: chat_template", message)
    return named


def _read_text(path: Path, name: str, below: str = "") -> str | None:
    data = read_file(path, name, _MAX_TEMPLATE_BYTES, below)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise ModelFormatError(path, name, f"not valid UTF-8: {error}") from None
