"""Mutations of tokenizer.json files of every kind: an error that names the file, or a tokenizer that works."""

from __future__ import annotations

import copy
import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from octavo.core.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from octavo.text.directory import tokenizer_from_directory
from tests.text import tiny

_JUNK: list[Any] = [
    None,
    0,
    -1,
    1,
    2**31,
    2**64,
    1.5,
    "",
    "a",
    "Ġ",
    "x" * 300,
    [],
    {},
    [[]],
    True,
    ["a", 1],
    {"String": "a"},
]
_TYPES = """BPE WordPiece WordLevel Unigram Sequence NFC NFKC Precompiled Replace Prepend Lowercase Strip Nmt ByteLevel
BertNormalizer Split Metaspace Digits Punctuation Whitespace FixedLength UnicodeScripts CharDelimiterSplit
TemplateProcessing BertProcessing RobertaProcessing Fuse ByteFallback Exec""".split()
_PATTERNS = [r"(a+)+$", r"\s+", r"(a|b)*", r"\p{L}+|.", "[", "(?:", r"\s*\s*(?=x)", "a{1000}", r"(\d{3})+", ""]
_PATTERNS += [r"\s+$", r"\s*[\r\n]+|\s+(?!\S)|\s+", "a*b|a+", "a+b|a", "[^x]*[^y]*w", "(?=a+)b", "a{1,3}+"]
_TEXTS = ["", "Hello <|im_end|> wörld 123", "a" * 20_000, " " * 20_000 + "x", " \n\t", "😀\U0010ffff", "\x00"]


@functools.cache
def _valid() -> list[dict[str, Any]]:
    specs = [
        json.loads(tiny.byte_level(kind, vocab_size=300)[0].backend_tokenizer.to_str()) for kind in ("gpt-2", "qwen2")
    ]
    specs.append(json.loads(tiny.sentencepiece_json().to_str()))
    words = specs[0] | {"model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}}
    scored = specs[0] | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
    return [*specs, words | {"added_tokens": []}, scored | {"added_tokens": []}]


def _places(value: Any, skip: int = 12) -> list[tuple[Any, Any]]:
    """Every container and key in it; of long ones the first few."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value)[:skip] if isinstance(value, dict) else list(range(min(len(value), skip)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key], skip)]


def make(rng: random.Random) -> bytes:
    spec = json.loads(json.dumps(rng.choice(_valid())))
    for _ in range(rng.randint(1, 3)):
        if not spec:
            break
        container, key = rng.choice(_places(spec))
        change = rng.randrange(6)
        if change == 0:
            container[key] = copy.deepcopy(rng.choice(_JUNK))
        elif change == 1 and isinstance(container, dict):
            del container[key]
        elif change == 2 and isinstance(container, dict):
            container["type"] = rng.choice(_TYPES)
        elif change == 3:
            pattern = {"Regex": rng.choice(_PATTERNS)}
            step = {"type": "Replace", "pattern": pattern, "content": rng.choice(["", "b", "b" * 40])}
            spec["normalizer"] = {"type": "Sequence", "normalizers": [step, {"type": rng.choice(_TYPES)}]}
        elif change == 4:
            step = {
                "type": "Split",
                "pattern": {"Regex": rng.choice(_PATTERNS)},
                "behavior": "Isolated",
                "invert": False,
            }
            spec["pre_tokenizer"] = rng.choice(
                [step, {"type": rng.choice(_TYPES)}, copy.deepcopy(spec.get("pre_tokenizer"))]
            )
        else:
            spec[rng.choice(list(spec))] = copy.deepcopy(rng.choice([spec[rng.choice(list(spec))], *_JUNK]))
    data = json.dumps(spec).encode()
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) * rng.randint(0, 4) + data[at + rng.randint(0, 4) :]
    return data


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(data)
        try:
            tokenizer = tokenizer_from_directory(folder)
        except (ModelFormatError, UnsupportedModelError):
            return
    for text in _TEXTS:
        try:
            ids = tokenizer.encode(text)
        except InvalidRequestError:
            continue
        tokenizer.decode(ids)
        tokenizer.text_stream(ids).advance(ids[:20])
