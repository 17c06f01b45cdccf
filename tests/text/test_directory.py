"""Tokenizers from Hugging Face directories, against transformers loading the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders, processors
from transformers import AutoTokenizer

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.text.directory import tokenizer_from_directory
from octavo.text.tokenizer import Tokenizer

from . import tiny
from .corpus import corpus


def write(path: Path, name: str, value: Any) -> None:
    (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    theirs, _ = tiny.byte_level("llama-bpe")
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    theirs.save_pretrained(tmp_path)
    pad = {"__type": "AddedToken", "content": "<think>", "normalized": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": pad}
    write(tmp_path, "tokenizer_config.json", config)
    return tmp_path


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    theirs, _ = tiny.scored(1, add_space_prefix=True)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return tmp_path


def assert_equal(path: Path, every: int = 1) -> Tokenizer:
    ours, theirs = tokenizer_from_directory(path), AutoTokenizer.from_pretrained(path)
    for text in corpus(specials=("<|im_end|>", "<think>", "<s>", "</s>"))[::every]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)
    assert ours.special_token_ids == {n for n, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)
    return ours


def test_byte_level_equals_transformers(byte_level: Path) -> None:
    ours = assert_equal(byte_level)
    assert ours.encode("a")[0] == 1  # the post-processor of tokenizer.json
    assert ours.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<think>"}


def test_sentencepiece_style_equals_transformers(scored: Path) -> None:
    ours = assert_equal(scored)
    assert ours.bos_token_id == 1
    stream = ours.text_stream([1])
    stream.advance(ours.encode("hello", add_special_tokens=False))
    assert stream.text == "hello"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True)])
def test_the_post_processor_decides_on_bos_and_eos(scored: Path, bos: bool, eos: bool) -> None:
    config = json.loads((scored / "tokenizer_config.json").read_text())
    write(scored, "tokenizer_config.json", {**config, "add_bos_token": bos, "add_eos_token": eos})
    assert assert_equal(scored, every=10).encode("") == [1]


THINK = {"content": "<think>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NEW = THINK | {"content": "<new>"}
LISTED = 1502  # the first id that tokenizer.json leaves free


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"added_tokens_decoder": {LISTED: NEW | {"special": True}}}},
        {"config": {"added_tokens_decoder": {LISTED: NEW | {"special": False, "rstrip": True, "normalized": True}}}},
        {"config": {"added_tokens_decoder": {LISTED - 2: THINK | {"special": True}}}},
        {"config": {"added_tokens_decoder": {LISTED - 2: THINK | {"special": False}}, "pad_token": "<think>"}},
        {"config": {"added_tokens_decoder": {LISTED: NEW | {"special": True}}}, "map": {"unk_token": "<think>"}},
        {"config": {"extra_special_tokens": {"image_token": "<think>", "other_token": "<new>"}}},
        {"config": {"extra_special_tokens": ["<think>", "<new>"]}},
        {"config": {"additional_special_tokens": ["<new>", {"__type": "AddedToken"} | THINK | {"special": True}]}},
        {"config": {"image_token": "<new>", "add_bos_token": True, "video_token": None}},
        {"config": {"pad_token": "<new>"}},
        {"config": {"split_special_tokens": True}},
        {"config": {"pad_token": "<think>"}, "map": {"pad_token": "<|endoftext|>", "unk_token": {"content": "<new>"}}},
        {"config": {}, "added": {"<new>": LISTED, "<other>": LISTED + 1}, "map": {"unk_token": "<new>"}},
    ],
)
def test_tokens_of_the_configuration_are_those_of_transformers(byte_level: Path, files: dict[str, Any]) -> None:
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    write(byte_level, "tokenizer_config.json", kept | files["config"])
    for key, name in (("map", "special_tokens_map.json"), ("added", "added_tokens.json")):
        if key in files:
            write(byte_level, name, files[key])
    ours, theirs = tokenizer_from_directory(byte_level), AutoTokenizer.from_pretrained(byte_level)
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids == {n for n, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_tokens == theirs.special_tokens_map
    for text in ("a<new> <think>b<|im_end|>", "<new> \n<other><think> ", *corpus(specials=("<new>", "<think>"))[-60:]):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_that_text_cannot_spell_still_stop(byte_level: Path) -> None:
    config = json.loads((byte_level / "tokenizer_config.json").read_text())
    write(byte_level, "tokenizer_config.json", config | {"split_special_tokens": True})
    ours = tokenizer_from_directory(byte_level)
    assert len(ours.encode("<|im_end|>", add_special_tokens=False)) > 1
    stream = ours.text_stream([], stop=["<|im_end|>"])
    stream.advance([*ours.encode("a", add_special_tokens=False), 2, 2])
    assert (stream.text, stream.stop_reason) == ("a", "<|im_end|>")


def test_end_tokens(byte_level: Path) -> None:
    assert tokenizer_from_directory(byte_level).eos_token_ids == (2,)
    write(byte_level, "config.json", {"model_type": "llama", "eos_token_id": 1})
    assert tokenizer_from_directory(byte_level).eos_token_ids == (1, 2)
    write(byte_level, "generation_config.json", {"eos_token_id": [5, 0]})  # this one goes before config.json
    assert tokenizer_from_directory(byte_level).eos_token_ids == (0, 2, 5)
    write(byte_level, "generation_config.json", {"eos_token_id": 7})
    assert tokenizer_from_directory(byte_level).eos_token_ids == (2, 7)


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"config": "C"}, {"default": "C"}),
        ({"config": NAMED}, {"default": "D", "tool_use": "T"}),
        ({"config": NAMED[:1]}, {"tool_use": "T"}),
        ({"config": {"default": "D", "rag": "R"}}, {"default": "D", "rag": "R"}),
        ({"config": NAMED, "chat_template.jinja": "Ä\n"}, {"default": "Ä\n"}),
        (
            {"config": "C", "chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"},
            {"default": "J", "tool_use": "T"},
        ),
        ({"config": "C", "additional_chat_templates/rag.jinja": "R"}, {"rag": "R"}),
    ],
)
def test_chat_templates_are_those_of_transformers(byte_level: Path, files: dict[str, Any], expected: Any) -> None:
    config = json.loads((byte_level / "tokenizer_config.json").read_text())
    write(byte_level, "tokenizer_config.json", {**config, "chat_template": files.get("config")})
    (byte_level / "additional_chat_templates").mkdir()
    for name in files.keys() - {"config"}:
        write(byte_level, name, files[name])
    theirs = AutoTokenizer.from_pretrained(byte_level).chat_template
    assert (theirs if isinstance(theirs, dict) else {"default": theirs} if theirs else {}) == expected
    ours = tokenizer_from_directory(byte_level)
    assert ours.chat_templates == expected
    assert ours.chat_template == expected.get("default")


@pytest.mark.parametrize("value", ["J", {"default": "J"}])
def test_chat_templates_of_processors(byte_level: Path, value: Any) -> None:
    """Models that take images too have theirs in a file of its own, which transformers' tokenizers do not read."""
    config = json.loads((byte_level / "tokenizer_config.json").read_text())
    write(byte_level, "tokenizer_config.json", {**config, "chat_template": "C"})
    write(byte_level, "chat_template.json", {"chat_template": value})
    assert tokenizer_from_directory(byte_level).chat_templates == {"default": "J"}


def test_special_tokens_map_is_the_fallback(byte_level: Path) -> None:
    write(byte_level, "tokenizer_config.json", {})
    write(byte_level, "special_tokens_map.json", {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    ours = tokenizer_from_directory(byte_level)
    assert ours.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        tokenizer_from_directory(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        tokenizer_from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json: model"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": 5}', "tokenizer_config.json: eos_token"),
        ("tokenizer_config.json", '{"split_special_tokens": 1}', "tokenizer_config.json: split_special_tokens"),
        ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "tokenizer_config.json: extra_special_tokens"),
        (
            "tokenizer_config.json",
            '{"extra_special_tokens": {"a": "x"}}',
            "tokenizer_config.json: extra_special_tokens",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": [1]}', "tokenizer_config.json: extra_special_tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "tokenizer_config.json: added_tokens_decoder"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": "y"}}',
            "tokenizer_config.json: added_tokens_decoder",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "<think>"}}}',  # it is another id's
            "tokenizer_config.json: added_tokens_decoder",
        ),
        ("added_tokens.json", '{"<new>": "1502"}', "added_tokens.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", '{"chat_template": {"default": 5}}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "tokenizer_config.json: chat_template"),
        ("chat_template.json", '{"chat_template": 5}', "chat_template.json: chat_template"),
        ("special_tokens_map.json", '{"bos_token": ["a"]}', "special_tokens_map.json: bos_token"),
        ("generation_config.json", '{"eos_token_id": "2"}', "generation_config.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "generation_config.json: eos_token_id"),
        ("config.json", '{"eos_token_id": -1}', "config.json: eos_token_id"),
    ],
)
def test_malformed_files(byte_level: Path, name: str, content: str, field: str) -> None:
    write(byte_level, name, content)
    with pytest.raises(ModelFormatError) as caught:
        tokenizer_from_directory(byte_level)
    assert caught.value.field == field


def test_invalid_utf8(byte_level: Path) -> None:
    (byte_level / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFormatError, match="UTF-8"):
        tokenizer_from_directory(byte_level)


def test_unsupported_decoders(byte_level: Path) -> None:
    theirs, _ = tiny.byte_level("gpt-2")
    for decoder in (decoders.WordPiece(), decoders.Metaspace(), decoders.CTC(), None):
        fast = theirs.backend_tokenizer
        fast.decoder = decoder
        fast.save(str(byte_level / "tokenizer.json"))
        with pytest.raises(UnsupportedModelError, match="ByteLevel"):
            tokenizer_from_directory(byte_level)


def test_code_in_the_directory_is_not_run(byte_level: Path) -> None:
    """A config may name classes of the directory; loading must not import them."""
    write(byte_level, "evil.py", "raise SystemExit('ran')")
    write(byte_level, "tokenization_evil.py", "raise SystemExit('ran')")
    config = json.loads((byte_level / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}}
    write(byte_level, "tokenizer_config.json", config)
    assert tokenizer_from_directory(byte_level).encode("a")


def test_truncation_and_padding_in_the_file_are_not_applied(byte_level: Path) -> None:
    """A long prompt must not lose its end without a word."""
    theirs, _ = tiny.byte_level("llama-bpe")
    fast = theirs.backend_tokenizer
    whole = fast.encode("a b c d e f g h i").ids
    fast.enable_truncation(4)
    fast.enable_padding(length=16)
    fast.save(str(byte_level / "tokenizer.json"))
    assert tokenizer_from_directory(byte_level).encode("a b c d e f g h i") == whole


def test_very_many_or_long_templates(byte_level: Path) -> None:
    folder = byte_level / "additional_chat_templates"
    folder.mkdir()
    (folder / "long.jinja").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(ModelFormatError, match="is larger than 1048576 bytes"):
        tokenizer_from_directory(byte_level)
    (folder / "long.jinja").unlink()
    for n in range(65):
        (folder / f"t{n}.jinja").write_text("x")
    with pytest.raises(ModelFormatError, match="has 65 templates; 64 are allowed"):
        tokenizer_from_directory(byte_level)
