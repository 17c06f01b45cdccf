"""Tokenizer files written to harm: an error that names the part, before the library sees it; or one request's error."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text.library import LibraryError, called
from octavo.text.regex_shape import UnsafePatternError, check_pattern
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_spec import TokenizerSpec

from . import tiny

Spec = dict[str, Any]


@pytest.fixture(scope="module")
def valid() -> Spec:
    """Byte-level, with a part of every kind."""
    spec = json.loads(tiny.byte_level("llama-bpe", vocab_size=400)[0].backend_tokenizer.to_str())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    return spec


def load(spec: Spec, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_directory(folder)


def refused(spec: Spec, folder: Path) -> ModelFormatError:
    with pytest.raises(ModelFormatError) as caught:
        load(spec, folder)
    assert caught.value.field.startswith("tokenizer.json")
    return caught.value


def replace(old: str, new: str) -> Spec:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern: str) -> Spec:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(units: list[int], texts: bytes = b"x\0") -> Spec:
    table = struct.pack(f"<{len(units)}I", *units)
    data = struct.pack("<I", len(table)) + table + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


NORMALIZERS: dict[str, Any] = {
    "grows": {"type": "Sequence", "normalizers": [replace("l", "l" * 60)] * 3},
    "grows at once": replace("l", "l" * 1000),
    "grows by an expression": {"type": "Replace", "pattern": {"Regex": "l|"}, "content": "l" * 64},
    "grows by prefixes": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "l" * 60}] * 2},
    "empty pattern": replace("", "l"),
    "many": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100},
    "nested": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "Sequence",
         "normalizers": []}]}]}]}]},
    "backtracks": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    "unknown": {"type": "Python", "code": "1"},
    "no type": {"normalizers": []},
    "a list": [{"type": "NFC"}],
    "charsmap, not base64": {"type": "Precompiled", "precompiled_charsmap": "@@@"},
    "charsmap, short": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "charsmap, size": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()},
    "charsmap, table too small for a byte": charsmap([0] * 128),
    "charsmap, outside": charsmap([1 << 30] * 256),
    "charsmap, value outside": charsmap([(1 << 31) | 999] * 256),
    "charsmap, value inside a character": charsmap([(1 << 31) | 1] * 256, "ä\0".encode()),
    "charsmap, texts": charsmap([0] * 256, b"\xff\0"),
    "charsmap, long texts": charsmap([0] * 256, b"x" * 1000 + b"\0"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers(valid: Spec, tmp_path: Path, name: str) -> None:
    error = refused(valid | {"normalizer": NORMALIZERS[name]}, tmp_path)
    assert error.field.startswith("tokenizer.json: normalizer")


SAFE = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    tiny.LLAMA3,
    tiny.QWEN2,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+(?!\S)|\s+",
    r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+",
    "[一-龥぀-ゟ゠-ヿ]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    " {2,}",
    "[0-9][0-9][0-9]",
    r"[]a]+|[^]a]+",
    r"[[:alpha:]]+|\x{4E00}|\u4e00|{|a{,}|\t",
    r"(?i)ab|(?>a)b|(?<=a)b|a*?b|a++",
]
UNSAFE = [
    "(a+)+$", "(a|aa)+$", "(a*)*b", "(?:a?){50}a{50}", "((a{1,9}){1,9}){1,9}", "(a|b|ab)*c", "a**", "a+{2}",
    "a{2}{3}", "(?:(?:a)+)+", r"(.)\1", "(?R)", r"\g<0>", r"(?<n>a)\k<n>", "(?(1)a|b)", "(?~abc)", "(?{x})",
    "(*FAIL)", "a{5000}", "a{1,99999}", "(" * 50, "[" * 50, "[", "(a", "a)", r"(\s*)+", r"(?:\s|\s)*x",
    "(?:[ab][bc]?)+d", "(?>a+)+", r"\X*x", r"\Ra", "\\", r"\p{", "x" * 9000,
]  # fmt: skip


@pytest.mark.parametrize("pattern", SAFE)
def test_expressions_of_real_models(valid: Spec, tmp_path: Path, pattern: str) -> None:
    load(valid | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern), BYTES]}}, tmp_path)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize("pattern", UNSAFE)
def test_expressions_that_may_take_for_ever(pattern: str) -> None:
    with pytest.raises(UnsafePatternError):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", [r"\s*\s*(?=x)", r"a*a*a*(?=b)", "a+a+", "(?:"])
def test_expressions_that_fail_on_trial(valid: Spec, tmp_path: Path, pattern: str) -> None:
    """Some that share a run of characters out in many ways are found by trying, and what the library cannot read."""
    refused(valid | {"pre_tokenizer": split(pattern)}, tmp_path)


def changed(spec: Spec, part: str, **values: Any) -> Spec:
    return spec | {part: spec[part] | values}


PARTS: dict[str, tuple[str, Callable[[Spec], Spec]]] = {
    "no model": ("model", lambda s: {k: v for k, v in s.items() if k != "model"}),
    "model of no kind": ("model.type", lambda s: changed(s, "model", type="Pickle")),
    "ids negative": ("model.vocab", lambda s: changed(s, "model", vocab=s["model"]["vocab"] | {"zz": -1})),
    "ids beyond": ("model.vocab", lambda s: changed(s, "model", vocab=s["model"]["vocab"] | {"zz": 2**31})),
    "ids of 64 bits": ("model.vocab", lambda s: changed(s, "model", vocab=s["model"]["vocab"] | {"zz": 2**64})),
    "ids as bools": ("model.vocab", lambda s: changed(s, "model", vocab=s["model"]["vocab"] | {"zz": True})),
    "a long token": ("model.vocab", lambda s: changed(s, "model", vocab=s["model"]["vocab"] | {"z" * 5000: 0})),
    "dropout": ("model.dropout", lambda s: changed(s, "model", dropout=0.5)),
    "dropout NaN": ("model.dropout", lambda s: changed(s, "model", dropout=float("nan"))),
    "a flag": ("model.ignore_merges", lambda s: changed(s, "model", ignore_merges=1)),
    "a prefix": ("model.continuing_subword_prefix", lambda s: changed(s, "model", continuing_subword_prefix="#" * 999)),
    "merges without the prefix": ("model.merges", lambda s: changed(s, "model", continuing_subword_prefix="a")),
    "merges": ("model.merges", lambda s: changed(s, "model", merges={})),
    "words": ("model.max_input", lambda s: s | {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "u",
        "continuing_subword_prefix": "#", "max_input_chars_per_word": 10**9}}),
    "scores": ("model.vocab", lambda s: s | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e999]]}}),
    "unknown beyond": ("model.unk_id", lambda s: s | {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 1]]}}),
    "added": ("added_tokens[0].id", lambda s: s | {"added_tokens": [s["added_tokens"][0] | {"id": 2**32}]}),
    "added text": ("added_tokens[0].content", lambda s: s | {"added_tokens": [s["added_tokens"][0] | {"content": 5}]}),
    "delimiter": ("pre_tokenizer.delimiter", lambda s: s | {"pre_tokenizer": {"type": "CharDelimiterSplit"}}),
    "behavior": ("pre_tokenizer.behavior", lambda s: s | {"pre_tokenizer": split("a") | {"behavior": "Eval"}}),
    "length": ("pre_tokenizer.length", lambda s: s | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),
    "pre_tokenizer": ("pre_tokenizer.type", lambda s: s | {"pre_tokenizer": {"type": "Exec"}}),
    "post_processor": ("post_processor.type", lambda s: s | {"post_processor": {"type": "Exec"}}),
    "ids of a template": ("post_processor.special", lambda s: s | {"post_processor": {"type": "TemplateProcessing",
        "single": [], "pair": [], "special_tokens": {"x": {"id": "x", "ids": [1] * 10**5, "tokens": []}}}}),
    "long template": ("post_processor.single", lambda s: s | {"post_processor": {"type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**4, "pair": [], "special_tokens": {}}}),
    "more": ("code", lambda s: s | {"code": "1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts(valid: Spec, tmp_path: Path, name: str) -> None:
    part, change = PARTS[name]
    assert part in refused(change(valid), tmp_path).field


@pytest.mark.parametrize("model", ["WordLevel", "Unigram"])
def test_models_that_cannot_write_an_unknown_word(valid: Spec, tmp_path: Path, model: str) -> None:
    """The library raises a bare Exception there, once such a word comes."""
    of_kind = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    spec = valid | {
        "model": of_kind if model == "WordLevel" else {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}
    }
    assert "fails on texts such as" in str(refused(spec | {"added_tokens": []}, tmp_path))


def test_keys_that_stand_twice(valid: Spec, tmp_path: Path) -> None:
    """The library takes the other one."""
    text = json.dumps(valid)
    text = text.replace('"normalizer"', '"normalizer": ' + json.dumps(replace("l", "l" * 10**6)) + ', "normalizer"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFormatError, match="stands there twice"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 10**5, b'{"model": ' * 10**5, b"9" * 10**6, b"null"])
def test_files_that_are_none(data: bytes) -> None:
    with pytest.raises(ModelFormatError):
        TokenizerSpec("folder", data)


def test_charsmaps_of_sentencepiece_are_taken(valid: Spec, tmp_path: Path) -> None:
    sentences = tmp_path / "text"
    sentences.write_text("a b c d\n" * 9)
    SentencePieceTrainer.Train(
        input=str(sentences), model_prefix=str(tmp_path / "m"), vocab_size=9, hard_vocab_limit=False, minloglevel=2
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((tmp_path / "m.model").read_bytes())
    table = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    assert len(table) > 100_000
    ours = load(valid | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}, tmp_path)
    assert ours.encode("①ﬁ") == ours.encode("1fi")


def test_texts_that_would_grow_too_long(valid: Spec, tmp_path: Path) -> None:
    ours = load(valid | {"normalizer": replace("l", "l" * 60)}, tmp_path)
    with pytest.raises(InvalidRequestError, match=r"^prompt: this model's tokenizer takes 1118481 characters"):
        ours.encode("x" * 1_200_000)
    assert len(ours.encode("l", add_special_tokens=False)) > 1


# --- what no check foresees ---

# It shares a run of Thai letters out in many ways; the texts that are tried have none.
PANICS = r"\p{Thai}*[\p{Thai}]*(?=\d)|\s+"
HARMFUL = "\u0e05" * 4600 + "!1"


def test_a_text_that_the_library_fails_on(valid: Spec, tmp_path: Path) -> None:
    ours = load(valid | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(PANICS), BYTES]}}, tmp_path)
    calls = (ours.encode, ours.encode_open, ours.encode_inside, lambda text: ours.encode_following([1], text))
    for call in calls:
        with pytest.raises(InvalidRequestError, match=r"^prompt: this model's tokenizer fails on the text: Panic"):
            call(HARMFUL)
    assert ours.encode("fine")


def test_calls_of_the_library() -> None:
    with pytest.raises(LibraryError, match="PanicException"):
        called(tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated").pre_tokenize_str, "a" * 40 + "b")
    for error in (KeyboardInterrupt, SystemExit, ModelFormatError):

        def raising(error: type[BaseException] = error) -> None:
            raise error(*["x"] * 3)

        with pytest.raises(error):
            called(raising)
