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
from octavo.text.byte_level import byte_alphabet
from octavo.text.directory import tokenizer_from_directory
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.library import MAX_TEXT_BYTES, LibraryError, called
from octavo.text.regex_shape import MAX_RUN, MAX_STEPS, UnsafePatternError, check_pattern
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_spec import TokenizerSpec, read_spec

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
    return tokenizer_from_directory(folder)


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
    "slow on accents": {"type": "NFKD"},
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


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def cased(upper: str, lower: str, after: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{after}|{before}{upper}+{lower}*{after}"


O200K = cased(f"[{UPPER}]", f"[{LOWER}]", CONTRACTIONS + "?")
KIMI = cased(rf"[{UPPER}&&[^\p{{Han}}]]", rf"[{LOWER}&&[^\p{{Han}}]]", CONTRACTIONS + "?")
CASED_ONCE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SAFE = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",  # its latest form
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    tiny.LLAMA3,  # also cl100k, DBRX, GLM-4, OLMo 2, Phi-4
    tiny.QWEN2,
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,  # Qwen 3.5
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,  # Seed
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s",
    CASED_ONCE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    O200K + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
    O200K.replace(CONTRACTIONS + "?", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,  # Tekken
    O200K.replace(CONTRACTIONS, CASED_ONCE) + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
    r"[\p{Han}]+|" + KIMI + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    # DeepSeek V3
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|"
    r"\s+(?!\S)|\s+",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[一-龥ࠀ-一가-퟿]+",
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    # DeepSeek, its first models
    r"\s+$",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺ\U00010400-\U0001044f]+",
    "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\r\n]",
    # Falcon, BLOOM, CLIP, Chameleon, Gemma, T5
    r"[\p{P}\$\+<=>\^~\|`]+",
    r" ?[^(\s|.,!?…。，、।۔،)]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"([\t\n]|    |  )",
    r"[\p{P}!-/:-@\[-`{-~]",
    r"[^\n]+|[\n]+",
    " {2,}",
    r"\s+",
    # Digits
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,3}",
    "[0-9][0-9][0-9]",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?=(\d{3})+(?!\d))",
    # of no model
    r"[]a]+|[^]a]+",
    r"[[:alpha:]]+|\x{4E00}|\u4e00|{|a{,}|\t",
    r"(?i)ab|(?>a)b|(?<=a)b|a*?b|a++",
]
UNSAFE = [
    "(a+)+$", "(a|aa)+$", "(a*)*b", "(?:a?){50}a{50}", "((a{1,9}){1,9}){1,9}", "(a|b|ab)*c", "a**", "a+{2}",
    "a{2}{3}", "(?:(?:a)+)+", r"(.)\1", "(?R)", r"\g<0>", r"(?<n>a)\k<n>", "(?(1)a|b)", "(?~abc)", "(?{x})",
    "(*FAIL)", "a{5000}", "a{1,99999}", "(" * 50, "[" * 50, "[", "(a", "a)", r"(\s*)+", r"(?:\s|\s)*x",
    "(?:[ab][bc]?)+d", "(?>a+)+", r"\X*x", r"\Ra", "\\", r"\p{", "x" * 9000,
    # walks a run from each of its characters
    "a+$", r"\s+$|x", "a+b", "a*b|a", "a+b|a|a+", "a+b|a+?", r"\s*[\r\n]+|\s", r"\s+(?!\S)x|\s", "a*+b", "a{3,}b",
    "a{1,500}b|c", "a{1,3}+b", "(?=.*x)a", r"(?:\s*[\r\n])|b", "(?:a+|b)c", "(?s:.*)x", "(?:aa)*b", "(?<!b)a+(?=c)",
    ".{0,50}a*b|a+", "a*b|aa+", "(?i:a*b)|a+", "a+b|(?:a+)c",
    # walks several runs in many ways
    "a+[a-z]+b", "[ab]+[abc]+[abcd]+x", "[^x]*[^y]*[^z]*w", r"\s*\S?\s*\S?\s*x", "a*b*c|a+",
    "a?" * 12 + "a" * 12, "(?:a|ab)" * 12, "[ab]?[abc]?" * 6,
    # reads otherwise than it looks
    "(?x)a+ +", "(?i)a(?i)b|c", r"\Qa+\E", r"\Ga+", r"\Ka", "a{3}?", "a{5,2}", r"\b*", "(?=a)*", "a{1,2}*",
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
        tokenizer_from_directory(tmp_path)


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
    many = MAX_TEXT_BYTES // 60 + 1
    with pytest.raises(
        InvalidRequestError, match=rf"^prompt: .* may have more than {MAX_TEXT_BYTES} bytes.* {many} characters"
    ):
        ours.encode("x" * many)
    assert len(ours.encode("l", add_special_tokens=False)) > 1


@pytest.mark.parametrize(
    ("form", "char", "size"),
    [("NFC", "\u0390", 6), ("NFD", "\u0390", 6), ("NFKC", "\ufdfa", 33)],
)
def test_texts_that_unicode_makes_longer(valid: Spec, tmp_path: Path, form: str, char: str, size: int) -> None:
    """It is what a text becomes that counts, not what it might."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(valid | {"normalizer": {"type": form}}))
    spec, _ = read_spec(tmp_path, "tokenizer.json")
    assert spec.takes("a" * MAX_TEXT_BYTES)
    assert not spec.takes("a" * (MAX_TEXT_BYTES + 1))
    assert spec.takes(char * (MAX_TEXT_BYTES // size))
    assert not spec.takes(char * (MAX_TEXT_BYTES // size + 1))


def test_tables_may_make_texts_longer_than_unicode(valid: Spec, tmp_path: Path) -> None:
    ours = load(valid | {"normalizer": charsmap([0] * 256, b"x" * 60 + b"\0")}, tmp_path)
    ours.encode("a" * 1000)
    with pytest.raises(InvalidRequestError, match="may have more than"):
        ours.encode("a" * (MAX_TEXT_BYTES // 60 + 1))


def test_texts_beyond_what_is_tokenised_in_one_go(smollm2: Tokenizer) -> None:
    """The library has several hundred bytes for each."""
    for text in ("a" * (MAX_TEXT_BYTES + 1), "\u4e2d" * (MAX_TEXT_BYTES // 3 + 1)):
        with pytest.raises(InvalidRequestError, match=rf"^prompt: has {len(text.encode())} bytes of text"):
            smollm2.encode(text)


# --- what takes time in the square of a text, or more ---


@pytest.mark.parametrize(
    ("pattern", "char"), [(r"\s+$", " "), (r"\d{1,3}(?=(?:\d{3})*\b)", "1"), (r"(?=(\d{3})+(?!\d))", "1")]
)
def test_known_expressions_that_are_slow_on_runs(valid: Spec, tmp_path: Path, pattern: str, char: str) -> None:
    steps = {"type": "Sequence", "pretokenizers": [split(pattern), BYTES]}
    ours = load(valid | {"pre_tokenizer": steps}, tmp_path)
    assert ours.encode("a" + char * MAX_RUN + "a")
    with pytest.raises(InvalidRequestError, match="run of more than 1000"):
        ours.encode("a" + char * (MAX_RUN + 1) + "a")
    many = {"type": "Sequence", "pretokenizers": [split(pattern)] * 5 + [BYTES]}
    assert f"more than {MAX_STEPS} steps" in str(refused(valid | {"pre_tokenizer": many}, tmp_path))
    # where something makes other runs than those of the text
    makes = {"type": "Metaspace", "replacement": char, "prepend_scheme": "never", "split": False}
    refused(valid | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [makes, split(pattern), BYTES]}}, tmp_path)
    refused(valid | {"pre_tokenizer": steps, "normalizer": replace("a", char)}, tmp_path)


def test_expressions_of_a_replacement(valid: Spec, tmp_path: Path) -> None:
    for pattern in (r"\s+$", "a+b"):
        refused(valid | {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}}, tmp_path)


def test_many_steps(valid: Spec, tmp_path: Path) -> None:
    """As many as are allowed of one sequence, in several."""

    def nested(outer: int, inner: int, step: Spec) -> Spec:
        many = {"type": "Sequence", "pretokenizers": [step] * inner}
        return valid | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [many] * outer + [BYTES]}}

    load(nested(1, 20, split("a|b|c|d|e|f")), tmp_path)
    assert "more than 32 parts in all" in str(refused(nested(4, 10, split("a|b|c|d|e|f")), tmp_path))
    assert f"more than {MAX_STEPS} steps" in str(refused(nested(1, 6, split("x" * 200)), tmp_path))
    assert f"more than {MAX_STEPS} steps" in str(
        refused(nested(1, 6, split("x") | {"pattern": {"String": "x" * 200}}), tmp_path)
    )


def test_long_tokens_of_unigram(valid: Spec, tmp_path: Path) -> None:
    """At each character the library looks at all that begin there."""
    for size, taken in ((128, True), (129, False)):
        model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * size, -1.0]]}
        spec = valid | {"model": model, "added_tokens": []}
        if taken:
            load(spec, tmp_path)
        else:
            assert refused(spec, tmp_path).field == "tokenizer.json: model.vocab"


def test_added_tokens_of_very_many_lengths(valid: Spec, tmp_path: Path) -> None:
    token = valid["added_tokens"][0]
    added = [token | {"id": 5000 + n, "content": "a" * n + "b"} for n in range(1, 200)]
    assert "tokens that begin with 'a' have 199 lengths" in str(refused(valid | {"added_tokens": added}, tmp_path))
    load(valid, tmp_path)
    listed = ["a" * n + "b" for n in range(1, 200)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": listed}))
    with pytest.raises(ModelFormatError, match="have 199 lengths"):
        tokenizer_from_directory(tmp_path)


def test_added_tokens_of_very_many_lengths_in_gguf() -> None:
    tokens = ["<unk>", "a", "\u2581", *("a" * n + "c" for n in range(2, 200))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 1, 1] + [4] * (len(tokens) - 3),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    with pytest.raises(ModelFormatError, match=r"tokenizer.ggml.tokens: tokens that begin with 'a' have 198 lengths"):
        tokenizer_from_gguf(metadata)


# --- amounts ---


@pytest.mark.parametrize("body", ["[],", "{},", "0,", '{"a":0},'])
def test_files_that_would_take_much_memory(body: str) -> None:
    """Refused before they are parsed: the names of the parts are not looked at."""
    data = b'{"nonsense":[' + body.encode() * ((1 << 22) + 1) + b"0]}"
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: has \d+ (lists|objects|commas); \d+ are allowed"):
        TokenizerSpec("folder", data)


@pytest.mark.parametrize("body", ["[],", "{},", "0,"])
def test_small_files_that_would_take_much_memory(valid: Spec, tmp_path: Path, body: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"a":[' + body * ((1 << 19) + 1) + "0]}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(valid))
    with pytest.raises(ModelFormatError, match=r"tokenizer_config.json: has \d+ (lists|objects|commas)"):
        tokenizer_from_directory(tmp_path)


def test_as_many_tokens_and_merges_as_the_largest_models_have() -> None:
    """Gemma 3: every merge is a list of two."""
    tokens = {f"t{n}": n for n in range(262_144)}
    merges = [["t1", "t2"]] * 514_906
    spec = {"model": {"type": "BPE", "vocab": tokens, "merges": merges}}
    assert TokenizerSpec("folder", json.dumps(spec).encode()).max_token_id == 262_143


# --- what no check foresees ---


def test_a_text_that_the_library_fails_on(valid: Spec, tmp_path: Path) -> None:
    """Of all bytes one is no token, and the texts that are tried do not have it."""
    missing = {byte: char for char, byte in byte_alphabet().items()}["\u0e05".encode()[-1]]
    vocab = [[char, -1.0] for char in byte_alphabet() if char != missing]
    model = {"type": "Unigram", "unk_id": None, "vocab": vocab}
    ours = load(valid | {"model": model, "added_tokens": [], "pre_tokenizer": BYTES}, tmp_path)
    calls = (ours.encode, ours.encode_open, ours.encode_inside, lambda text: ours.encode_following([1], text))
    for call in calls:
        with pytest.raises(InvalidRequestError, match=r"^prompt: this model's tokenizer fails on the text: Exc"):
            call("\u0e05")
    assert ours.encode("fine")


def test_calls_of_the_library() -> None:
    with pytest.raises(LibraryError, match="PanicException"):
        called(tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated").pre_tokenize_str, "a" * 40 + "b")
    for error in (KeyboardInterrupt, SystemExit, ModelFormatError):

        def raising(error: type[BaseException] = error) -> None:
            raise error(*["x"] * 3)

        with pytest.raises(error):
            called(raising)
