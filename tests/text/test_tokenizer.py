"""Tokenizers from GGUF metadata against transformers: a wrong id anywhere silently changes what the model reads."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from octavo.core.errors import InvalidRequestError, UnsupportedModelError
from octavo.core.protocols import TextCodec
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.tokenizer import Tokenizer

from . import tiny
from .corpus import corpus


def assert_equal(ours: Tokenizer, theirs: PreTrainedTokenizerBase, strings: list[str]) -> None:
    assert len(set(strings)) >= 1000
    for text in strings:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        plain = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == plain, repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)


def special_ids(theirs: PreTrainedTokenizerBase) -> set[int]:
    return {token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.slow  # the tiny vocabularies above have the same pre-tokenizers
@pytest.mark.smollm2
def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers does not know the pre-tokenizer "smollm" and splits as GPT-2 does. SmolLM2's own file has this:
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    assert_equal(smollm2, theirs, corpus(specials=("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<repo_name>")))
    assert smollm2.vocab_size == len(theirs)
    assert smollm2.special_token_ids == special_ids(theirs)


GEMMA3_SPECIALS = ("<bos>", "<eos>", "<start_of_turn>", "<unused7>", "<h1>", "[multimodal]")
GEMMA3_DIGESTS = Path(__file__).parent / "gemma3_digests.json"


def digests(encode: Callable[[str], list[int]], strings: list[str]) -> list[str]:
    """A short digest of the ids of each string."""
    return [hashlib.sha256(repr(encode(text)).encode()).hexdigest()[:10] for text in strings]


def gemma3_strings() -> list[str]:
    long = " ".join(corpus(seed=3))  # one text of many thousand tokens, with everything in it
    return [*corpus(specials=GEMMA3_SPECIALS), long]


@pytest.mark.gemma3
def test_gemma3_equals_what_transformers_gave(gemma3: Tokenizer) -> None:
    """transformers takes some 15 s to load this vocabulary, so its results are on file; see the slow test below."""
    strings = gemma3_strings()
    assert len(set(strings)) >= 1000
    expected = json.loads(GEMMA3_DIGESTS.read_text())["digests"]
    wrong = [
        text
        for text, ours, theirs in zip(strings, digests(gemma3.encode, strings), expected, strict=True)
        if ours != theirs
    ]
    assert not wrong, f"{len(wrong)} strings differ, such as {wrong[:3]!r}"
    for text in strings:
        if "<" not in text:
            assert gemma3.decode(gemma3.encode(text)) == text.replace("▁", " ")


@pytest.mark.slow
@pytest.mark.gemma3
def test_gemma3_equals_transformers(gemma3: Tokenizer, gemma3_path: Path) -> None:
    """Also writes the file for the test above anew."""
    theirs = AutoTokenizer.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name)
    strings = gemma3_strings()
    assert_equal(gemma3, theirs, strings)
    assert gemma3.vocab_size == len(theirs) == 262144
    assert gemma3.special_token_ids == special_ids(theirs)
    made_by = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__, "seeds": [20, 3]}
    GEMMA3_DIGESTS.write_text(
        json.dumps({"made_by": made_by, "digests": digests(theirs.encode, strings)}, indent=0) + "\n"
    )


@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe", "gpt-2", "default"])
def test_byte_level_kinds_equal_transformers(kind: str) -> None:
    theirs, metadata = tiny.byte_level(kind)
    strings = corpus(specials=(*tiny.CONTROL, *tiny.USER_DEFINED))
    ours = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert_equal(ours, theirs, strings)


def test_pre_tokenizers_differ() -> None:
    """Guards the test above: were the kinds alike, it could not tell a wrong one."""
    _, metadata = tiny.byte_level("llama-bpe")
    ids = {}
    for kind in ("smollm", "qwen2", "llama-bpe", "gpt-2"):
        ours = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": kind})
        ids[kind] = [ours.encode(text) for text in corpus()]
    for one, other in itertools.combinations(ids, 2):
        assert ids[one] != ids[other], (one, other)


ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "stablelm2": "qwen2",
    "hunyuan": "qwen2",
}


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_one_pre_tokenizer(name: str) -> None:
    _, metadata = tiny.byte_level(ALIASES[name])
    ours, other = (tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": pre}) for pre in (ALIASES[name], name))
    assert all(ours.encode(text) == other.encode(text) for text in corpus())


def test_llama3_takes_whole_words_its_merges_cannot_reach() -> None:
    _, metadata = tiny.byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("ĠzzqzzĠ")
    metadata["tokenizer.ggml.tokens"].append("Ġzzqzz")
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    token_id = metadata["tokenizer.ggml.tokens"].index("Ġzzqzz")
    assert tokenizer_from_gguf(metadata).encode(" zzqzz") == [token_id]
    assert len(tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "qwen2"}).encode(" zzqzz")) > 1


@pytest.mark.parametrize("add_space_prefix", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_scored_vocabulary_equals_transformers(seed: int, add_space_prefix: bool) -> None:
    """Random scores with many ties: the order of merges matters everywhere."""
    theirs, metadata = tiny.scored(seed, add_space_prefix)
    ours = tokenizer_from_gguf(metadata)
    strings = corpus(seed=seed + 10, specials=("<s>", "</s>", "<think>", "</think>"))
    for text in strings:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


def test_scored_vocabulary_without_byte_tokens() -> None:
    """Characters that are no tokens become one unknown token a run."""
    theirs, metadata = tiny.scored(5, add_space_prefix=False, byte_fallback=False)
    ours = tokenizer_from_gguf(metadata)
    unknown = 0
    for text in corpus(seed=16):
        ids = theirs.encode(text)
        unknown += ids.count(0)
        assert ours.encode(text) == ids, repr(text)
    assert unknown > 100


def test_scores_and_types_may_be_arrays() -> None:
    _, metadata = tiny.scored(1, add_space_prefix=True)
    arrays = dict(metadata)
    arrays["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    arrays["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    arrays["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    one, other = tokenizer_from_gguf(metadata), tokenizer_from_gguf(arrays)
    assert all(one.encode(text) == other.encode(text) for text in corpus()[:300])


def test_text_that_spells_a_byte_token_is_text() -> None:
    """Otherwise a prompt could hold bytes that are not UTF-8, and would not decode to itself."""
    _, metadata = tiny.scored(1, add_space_prefix=False)
    for piece in ("<0", "<0x", "<0x4", "1>"):
        if piece not in metadata["tokenizer.ggml.tokens"]:
            metadata["tokenizer.ggml.tokens"].append(piece)
            metadata["tokenizer.ggml.scores"].append(-1.0)
            metadata["tokenizer.ggml.token_type"].append(1)
    ours = tokenizer_from_gguf(metadata)
    assert len(ours.encode("<0x41>", add_special_tokens=False)) > 1
    assert ours.decode(ours.encode("<0x41>")) == "<0x41>"


def test_equals_sentencepiece() -> None:
    theirs, metadata = tiny.sentencepiece_gguf()
    ours = tokenizer_from_gguf(metadata)
    for text in [*corpus(seed=6, specials=("[INST]", " [/INST]"))[:900], " a", "  a", tiny.SENTENCE]:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):  # SentencePiece takes them as text
            ids = theirs.encode(text)
            assert ours.encode(text, add_special_tokens=False) == ids, repr(text)
            if "\x00" not in text and "▁" not in text:
                assert ours.decode(ids) == text


def test_space_prefix_after_special_tokens_too() -> None:
    """Mistral's prompts are ``<s>[INST] ...`` with a space after every ``</s>``, in the ids though not in the text."""
    theirs, metadata = tiny.sentencepiece_gguf()
    ours = tokenizer_from_gguf(metadata)
    parts = ["[INST] Hello there [/INST]", "a whale", "[INST] a fish [/INST]"]
    expected = [1, *theirs.encode(parts[0]), *theirs.encode(parts[1]), 2, *theirs.encode(parts[2])]
    assert ours.encode(f"<s>{parts[0]} {parts[1]}</s>{parts[2]}", add_special_tokens=False) == expected
    assert ours.encode(" a", add_special_tokens=False) != ours.encode("a", add_special_tokens=False)
    assert ours.encode("", add_special_tokens=False) == []
    assert ours.decode(ours.encode("a")) == "a"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1]),  # SentencePiece-style files mean BOS unless they say otherwise
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [2]),
        ({"add_bos_token": False}, []),
    ],
)
def test_bos_and_eos_flags(flags: dict[str, bool], expected: list[int]) -> None:
    _, metadata = tiny.scored(1, add_space_prefix=False)
    ours = tokenizer_from_gguf({**metadata, **{f"tokenizer.ggml.{key}": value for key, value in flags.items()}})
    assert ours.encode("") == expected
    assert ours.encode("", add_special_tokens=False) == []


def test_llama3_adds_bos_unless_told_otherwise() -> None:
    _, metadata = tiny.byte_level("llama-bpe")
    with_bos = {**metadata, "tokenizer.ggml.bos_token_id": 0}
    assert tokenizer_from_gguf(with_bos).encode("a")[0] == 0
    assert tokenizer_from_gguf({**with_bos, "tokenizer.ggml.add_bos_token": False}).encode("a")[0] != 0
    assert tokenizer_from_gguf({**with_bos, "tokenizer.ggml.pre": "qwen2"}).encode("a")[0] != 0


@pytest.mark.smollm2
def test_smollm2_properties(smollm2: Tokenizer, smollm2_metadata: Mapping[str, Any]) -> None:
    codec: TextCodec = smollm2
    assert codec.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (0, 2)  # <|endoftext|>, <|im_end|>
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.chat_template == smollm2_metadata["tokenizer.chat_template"]
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.decode([2]) == ""
    assert smollm2.decode([2], skip_special_tokens=False) == "<|im_end|>"


@pytest.mark.gemma3
def test_gemma3_properties(gemma3: Tokenizer) -> None:
    assert gemma3.bos_token_id == 2
    assert gemma3.eos_token_ids == (1, 106)  # <eos>, <end_of_turn>; </s> is an HTML tag here, not an end
    assert gemma3.encode("")[0] == 2
    assert gemma3.token_bytes(gemma3.encode("  ", add_special_tokens=False)[0]) == b"  "
    assert {gemma3.token_bytes(238 + byte) for byte in range(256)} == {bytes([byte]) for byte in range(256)}


def test_end_tokens_are_found_by_key_and_by_name() -> None:
    _, metadata = tiny.byte_level("qwen2")
    think = metadata["tokenizer.ggml.tokens"].index("<think>")
    assert tokenizer_from_gguf(metadata).eos_token_ids == (0, 2)
    assert tokenizer_from_gguf({**metadata, "tokenizer.ggml.eot_token_id": think}).eos_token_ids == (0, 2, think)
    types = [1 if kind == 3 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    ordinary = {**metadata, "tokenizer.ggml.token_type": types}  # a name alone, on a token of ordinary text, is no end
    assert tokenizer_from_gguf(ordinary).eos_token_ids == (2,)


def test_token_bytes_of_every_token_make_the_text() -> None:
    for metadata in (tiny.byte_level("qwen2")[1], tiny.scored(1, add_space_prefix=False)[1]):
        ours = tokenizer_from_gguf(metadata)
        for text in corpus()[:400]:
            ids = ours.encode(text, add_special_tokens=False)
            assert b"".join(map(ours.token_bytes, ids)) == text.replace("▁", " " if ours.bos_token_id else "▁").encode()


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    """Models may have more rows than there are tokens, and a row may be drawn."""
    ours = tokenizer_from_gguf(tiny.byte_level("qwen2")[1])
    assert ours.token_bytes(ours.vocab_size) == b""
    assert ours.decode([ours.vocab_size + 5, *ours.encode("a")]) == "a"
    with pytest.raises(InvalidRequestError, match="token_ids"):
        ours.decode([-1])


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ok \udfff ok", 3), ("😀\ud83d", 1)])
def test_lone_surrogates_are_refused(text: str, position: int) -> None:
    for metadata in (tiny.byte_level("qwen2")[1], tiny.scored(1, add_space_prefix=False)[1]):
        with pytest.raises(InvalidRequestError, match=rf"surrogate U\+D.* at character {position}") as caught:
            tokenizer_from_gguf(metadata).encode(text)
        assert caught.value.field == "prompt"


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "", "GPT2"])
def test_other_kinds_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2, llama"):
        tokenizer_from_gguf({"tokenizer.ggml.model": kind})


def test_other_pre_tokenizers_are_unsupported() -> None:
    _, metadata = tiny.byte_level("qwen2")
    with pytest.raises(UnsupportedModelError, match=r"'tekken'.*smollm"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "tekken"})
