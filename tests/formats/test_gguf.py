"""The GGUF reader: every value type, every check, and agreement with the `gguf` package on real files."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from octavo.core.errors import ModelFormatError, ModelNotFoundError
from octavo.formats import GGUFFile, QuantType, StringArray
from octavo.formats import gguf as gguf_module

from .builder import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    U64,
    Raw,
    Tensor,
    array,
    gguf_file,
    sample_gguf,
    string,
)

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return path

    return write_file


def floats(n: int) -> bytes:
    return struct.pack(f"<{n}f", *range(n))


# What a sound file holds


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_value_type(write: Write, version: int) -> None:
    """Guards against a value read with the wrong width, sign or type."""
    content = sample_gguf()
    with GGUFFile(write(content[:4] + struct.pack("<I", version) + content[8:])) as file:
        assert file.version == version
        got = file.metadata
        expected = {
            "u8": 200,
            "i8": -100,
            "u16": 60000,
            "i16": -30000,
            "u32": 4_000_000_000,
            "i32": -2_000_000_000,
            "f32": 0.5,
            "bool": True,
            "u64": (1 << 64) - 1,
            "i64": -(1 << 63),
            "f64": 0.1,
            "string": "héllo",
        }
        for key, value in expected.items():
            assert got[key] == value
            assert type(got[key]) is type(value), key
        for key, values, dtype in [
            ("array.u8", [1, 2, 255], np.uint8),
            ("array.i32", [-1, 2, 3], np.int32),
            ("array.f32", [0.5, -1.5], np.float32),
            ("array.f64", [0.1], np.float64),
            ("array.bool", [True, False, True], np.bool_),
            ("array.empty", [], np.uint64),
        ]:
            assert got[key].tolist() == values
            assert got[key].dtype == dtype
            assert not got[key].flags.writeable
        assert got["array.string"] == ["", "a", "日本語", "🙂", "b" * 300]
        nested = got["array.nested"]
        assert nested[0].tolist() == [1, 2]
        assert nested[1] == ["x"]
        assert nested[2] == []
        assert list(got) == [*expected, *(k for k in got if k.startswith("array."))]
        with pytest.raises(TypeError):
            got["u8"] = 1  # type: ignore[index]


def test_tensors_are_views_with_outermost_dimension_first(write: Write) -> None:
    """Guards against transposed shapes and data taken from the wrong offset."""
    with GGUFFile(write(sample_gguf())) as file:
        assert list(file.tensors) == ["norm", "linear", "super"]
        linear = file.tensors["linear"]
        assert (linear.name, linear.shape, linear.dtype) == ("linear", (2, 64), QuantType.Q4_0)
        assert linear.data.shape == (2, 36)
        assert linear.nbytes == 72
        assert linear.size == 128
        assert linear.data.tobytes() == bytes(range(72))
        assert not linear.data.flags.writeable
        norm = file.tensors["norm"]
        assert norm.shape == (3,)
        assert norm.data.shape == (1, 12)
        assert norm.dequantize().tolist() == [1.0, -2.0, 3.5]
        assert norm.view().tolist() == [1.0, -2.0, 3.5]


def test_four_dimensions(write: Write) -> None:
    content = gguf_file(tensors=[Tensor("t", [2, 3, 4, 5], 0, floats(120))])
    with GGUFFile(write(content)) as file:
        tensor = file.tensors["t"]
        assert tensor.shape == (5, 4, 3, 2)
        assert tensor.data.shape == (60, 8)
        assert np.array_equal(tensor.dequantize(), np.arange(120, dtype=np.float32).reshape(5, 4, 3, 2))


def test_own_alignment(write: Write) -> None:
    """Guards against an alignment that is read and then not used."""
    tensors = [Tensor("a", [1], 0, floats(1)), Tensor("b", [2], 0, floats(2))]
    content = gguf_file([("general.alignment", U32, 256)], tensors, alignment=256)
    with GGUFFile(write(content)) as file:
        assert file.alignment == 256
        assert file.tensors["b"].dequantize().tolist() == [0.0, 1.0]


def test_gaps_between_tensors_are_allowed(write: Write) -> None:
    """Only overlaps are unsound: a file edited in place may leave gaps."""
    content = gguf_file(tensors=[Tensor("a", [1], 0, b"", offset=64), Tensor("b", [1], 0, b"", offset=0)])
    with GGUFFile(write(content + bytes(64) + floats(2)[4:])) as file:
        assert file.tensors["a"].dequantize().tolist() == [1.0]


def test_no_tensors(write: Write) -> None:
    with GGUFFile(write(gguf_file([("a", U8, 1)]))) as file:
        assert file.tensors == {}
        assert dict(file.metadata) == {"a": 1}


# Strings


def test_string_array_is_a_sequence(write: Write) -> None:
    words = ["zero", "", "twö", "three", "four"]
    with GGUFFile(write(gguf_file([("w", ARRAY, array(STRING, words))]))) as file:
        got = file.metadata["w"]
    assert isinstance(got, StringArray)  # and stays valid after close
    assert len(got) == 5
    assert got.to_list() == words == list(got) == [got[i] for i in range(5)]
    assert got[-1] == "four"
    assert got[3:0:-2].to_list() == words[3:0:-2]
    assert got[5:].to_list() == []
    assert got.to_bytes_list() == [w.encode() for w in words]
    assert got.raw(2) == "twö".encode()
    assert "three" in got
    assert got.index("three") == 3
    assert got == words
    assert got != words[:4]
    assert got != [*words[:4], "x"]
    for index in (5, -6):
        with pytest.raises(IndexError):
            got[index]


def test_strings_that_are_not_utf8(write: Write) -> None:
    """Guards against two different tokens becoming one, and against lone surrogates in what people print."""
    raw = [b"\xff", b"\xfe", b"a\xc3", "é".encode(), b"nul\0inside"]
    content = gguf_file([("tokens", ARRAY, array(STRING, raw)), ("name", STRING, b"bad \xff name")])
    with GGUFFile(write(content)) as file:
        tokens = file.metadata["tokens"]
        assert tokens.to_bytes_list() == raw
        decoded = tokens.to_list()
        assert len(set(decoded)) == 5
        assert [t.encode("utf-8", "surrogateescape") for t in decoded] == raw
        assert decoded[3] == "é"
        assert [tokens[i] for i in range(5)] == decoded
        assert file.metadata["name"] == "bad � name"


# Life of the mapping


def test_what_was_taken_out_survives_close(write: Write) -> None:
    """Guards against a view on an unmapped file: that would be a crash."""
    file = GGUFFile(write(sample_gguf()))
    tensor, numbers, strings = file.tensors["linear"], file.metadata["array.i32"], file.metadata["array.string"]
    file.close()
    file.close()
    assert tensor.data.tobytes() == bytes(range(72))
    assert numbers.tolist() == [-1, 2, 3]
    assert strings[2] == "日本語"
    for name in ("tensors", "metadata"):
        with pytest.raises(ValueError, match="closed"):
            getattr(file, name)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_closing_unmaps(write: Write) -> None:
    """Guards against mappings that pile up in a process that loads many models."""
    path = write(sample_gguf())
    maps = Path("/proc/self/maps")
    file = GGUFFile(path)
    assert str(path) in maps.read_text()
    file.close()
    assert str(path) not in maps.read_text()


# Files that are no files


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        GGUFFile(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(ModelFormatError, match="empty"):
        GGUFFile(tmp_path / "empty")
    with pytest.raises(ModelNotFoundError):
        GGUFFile(tmp_path / "empty" / "below")
    with pytest.raises(ModelFormatError, match="directory"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelNotFoundError, match="null"):
        GGUFFile(str(tmp_path / "nul\0l"))
    with pytest.raises(ModelFormatError, match="too long"):
        GGUFFile(tmp_path / ("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelFormatError, match="regular file"):
        GGUFFile(tmp_path / "fifo")


# Broken files: (what is wrong, content, field, part of the message)

ONE = Tensor("t", [4], 0, floats(4))
BIG = (1 << 64) - 1


def info(**changes: object) -> bytes:
    """A file with one tensor, changed; with ample data after it."""
    fields: dict[str, object] = {"name": "t", "dims": [4], "type_id": 0, "data": floats(4), **changes}
    return gguf_file(tensors=[Tensor(**fields)]) + bytes(256)  # type: ignore[arg-type]


def key(*value: object) -> bytes:
    return gguf_file([("k", *value)]) + bytes(64)  # type: ignore[list-item]


def alignment(value: int, kind: int = U32) -> bytes:
    return gguf_file([("general.alignment", kind, value)], [ONE]) + bytes(256)


def nested(depth: int) -> Raw:
    value = array(U8, [1])
    for _ in range(depth - 1):
        value = array(ARRAY, [value])
    return value


BROKEN = {
    "magic": (gguf_file(magic=b"ggjt"), "magic", "not a GGUF file"),
    "magic cut": (b"GG", "magic", "not a GGUF file"),
    "version cut": (b"GGUF\x03", "version", "needs 4 bytes"),
    "version 1": (gguf_file(version=1), "version", "1 is not supported"),
    "version 4": (gguf_file(version=4), "version", "4 is not supported"),
    "big-endian": (gguf_file(version=3 << 24), "version", "big-endian"),
    "big-endian version 1": (gguf_file(version=1 << 24), "version", "big-endian"),
    "tensor count huge": (gguf_file(tensor_count=BIG), "tensor_count", "more than"),
    "tensor count above file": (gguf_file(tensor_count=5), "tensor_count", "remain"),
    "key count huge": (gguf_file(pair_count=BIG), "metadata_kv_count", "more than"),
    "key count above file": (gguf_file(pair_count=60000), "metadata_kv_count", "remain"),
    "key count one too many": (gguf_file([("k", U32, 1)], pair_count=2) + bytes(14), "metadata[1].key", "1 to 65535"),
    "key empty": (gguf_file([("", U32, 1)]), "metadata[0].key", "1 to 65535"),
    "key too long": (gguf_file([("k" * 65536, U32, 1)]), "metadata[0].key", "1 to 65535"),
    "key not UTF-8": (gguf_file([(b"k\xff", U32, 1)]), "metadata[0].key", "UTF-8"),
    "key length": (
        gguf_file(pair_count=1) + string("k", BIG) + bytes(64),
        "metadata[0].key",
        f"length {BIG}",
    ),
    "key twice": (gguf_file([("k", U32, 1), ("k", U32, 1)]), "k", "twice"),
    "value type": (gguf_file(pair_count=1) + string("k") + struct.pack("<IQ", 13, 0), "k", "value type 13"),
    "boolean 2": (key(BOOL, 2), "k", "0 or 1"),
    "string value length": (key(STRING, Raw(string("abc", 1 << 63))), "k", f"length {1 << 63}"),
    "string value one too long": (gguf_file([("k", STRING, Raw(string("abc", 4)))]), "k", "3 bytes remain"),
    "array type": (key(ARRAY, Raw(struct.pack("<IQ", 99, 1))), "k", "element type 99"),
    "array count": (key(ARRAY, array(U8, [], BIG)), "k", "remain"),
    "array count times size wraps": (key(ARRAY, array(U64, [], 1 << 61)), "k", "remain"),
    "array one too long": (gguf_file([("k", ARRAY, array(F32, [1, 2], 3))]), "k", "remain"),
    "array of strings, count": (key(ARRAY, array(STRING, ["a"], 1 << 40)), "k", "remain"),
    "array of strings, length": (
        key(ARRAY, array(STRING, [Raw(string("a")), Raw(string("b", BIG))])),
        "k",
        "string 1 has length",
    ),
    "array of strings, last one too long": (
        gguf_file([("k", ARRAY, array(STRING, ["a", Raw(string("b", 2))]))]),
        "k",
        "string 1 has length 2, and 1 bytes remain",
    ),
    "array of strings, cut": (
        gguf_file([("k", ARRAY, array(STRING, ["a" * 30, "b"], 4))]),
        "k",
        "ends before string 2 of 4",
    ),
    "array of arrays, count": (key(ARRAY, array(ARRAY, [], 1 << 60)), "k", "remain"),
    "array of booleans": (key(ARRAY, array(BOOL, [0, 1, 2])), "k", "0 or 1"),
    "arrays too deep": (key(ARRAY, nested(5)), "k", "deeper than 4"),
    "alignment 0": (alignment(0), "general.alignment", "power of two"),
    "alignment 4": (alignment(4), "general.alignment", "multiple of 8"),
    "alignment 24": (alignment(24), "general.alignment", "power of two"),
    "alignment too far": (alignment(1 << 31), "t", "truncated"),
    "alignment as u64": (alignment(32, U64), "general.alignment", "uint32"),
    "alignment as float": (alignment(32, F32), "general.alignment", "uint32"),
    "tensor name empty": (info(name=""), "tensor_infos[0].name", "1 to 65535"),
    "tensor name not UTF-8": (info(name=b"\xc3("), "tensor_infos[0].name", "UTF-8"),
    "tensor name twice": (gguf_file(tensors=[ONE, ONE]), "t", "twice"),
    "0 dimensions": (info(dims=[]), "t", "not 0"),
    "5 dimensions": (info(dims=[1] * 5), "t", "not 5"),
    "dimension count huge": (info(ndim=1 << 31), "t", "dimensions"),
    "dimension 0": (info(dims=[4, 0]), "t", "0 elements"),
    "dimension negative": (info(dims=[BIG]), "t", "elements"),
    "dimension product wraps": (info(dims=[1 << 32, 1 << 32]), "t", "elements"),
    "dimension product wraps to fit": (info(dims=[1 << 62, 4, 4, 4]), "t", "elements"),
    "size in bytes wraps": (info(dims=[1 << 62]), "t", "truncated"),
    "tensor type unknown": (info(type_id=1000), "t", "1000 (unknown)"),
    "tensor type negative": (info(type_id=BIG >> 32), "t", "(unknown)"),
    "tensor type removed": (info(type_id=4), "t", "4 (unknown)"),
    "tensor type not supported": (info(type_id=23, dims=[256]), "t", "IQ4_XS"),
    "not whole blocks": (info(type_id=2, dims=[48]), "t", "whole Q4_0 blocks"),
    "not whole blocks in a row": (info(type_id=12, dims=[128, 2]), "t", "whole Q4_K blocks"),
    "offset not aligned": (info(offset=4), "t", "multiple of the alignment"),
    "offset past the end": (info(offset=1 << 20), "t", "truncated"),
    "offset wraps": (info(offset=BIG - 31), "t", "truncated"),
    "data cut": (gguf_file(tensors=[ONE])[:-1], "t", "truncated"),
    "data absent": (gguf_file(tensors=[Tensor("t", [4], 0, b"")]), "t", "truncated"),
    "tensors overlap": (
        gguf_file(tensors=[Tensor("a", [16], 0, floats(16)), Tensor("b", [1], 0, b"", offset=32)]),
        "b",
        "overlaps that of a",
    ),
    "tensors coincide": (gguf_file(tensors=[ONE, Tensor("u", [4], 0, b"", offset=0)]), "u", "overlaps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(write: Write, name: str) -> None:
    """Each unsound field is refused by name, and none is used before it is checked."""
    content, field, message = BROKEN[name]
    path = write(content)
    with pytest.raises(ModelFormatError) as error:
        GGUFFile(path)
    assert error.value.field == field
    assert error.value.path == str(path)
    assert message in str(error.value)


def test_every_truncation_is_refused(write: Write) -> None:
    """No prefix of a file passes for the file."""
    content = sample_gguf()
    for length in range(1, len(content)):
        with pytest.raises(ModelFormatError):
            GGUFFile(write(content[:length]))
    GGUFFile(write(content)).close()


def test_limits_on_items_and_header(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against files that are sound but made to cost minutes and gigabytes."""
    content = gguf_file([("a", ARRAY, array(STRING, ["x"] * 6)), ("b", ARRAY, array(STRING, ["x"] * 6))], [ONE])
    GGUFFile(write(content)).close()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "MAX_ITEMS", 11)
        with pytest.raises(ModelFormatError, match="b: the file's arrays hold more than 11"):
            GGUFFile(write(content))
    nested = ("c", ARRAY, array(ARRAY, [array(U32, []) for _ in range(6)]))
    GGUFFile(write(gguf_file([nested], [ONE]))).close()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "MAX_NESTED", 5)
        with pytest.raises(ModelFormatError, match="c: the file's arrays hold more than 5 arrays"):
            GGUFFile(write(gguf_file([nested], [ONE])))
    # Wherever the limit falls in the header it is an error; tensor data may lie behind it.
    path = write(content)
    data_start = len(content) - len(ONE.data)
    for limit in range(1, data_start - 31):
        monkeypatch.setattr(gguf_module, "MAX_HEADER_BYTES", limit)
        with pytest.raises(ModelFormatError):
            GGUFFile(path)
    monkeypatch.setattr(gguf_module, "MAX_HEADER_BYTES", data_start)
    GGUFFile(path).close()


def test_names_from_the_file_cannot_forge_log_lines(write: Write) -> None:
    """Errors end up in logs and terminals: no control characters, bounded length."""
    for name in ("evil\r\nINFO all is well\x1b[2J", "x" * 60000):
        with pytest.raises(ModelFormatError) as error:
            GGUFFile(write(gguf_file([(name, U32, 1), (name, U32, 1)])))
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)
        assert len(error.value.field) <= 100


# Real models


def assert_equal_to_gguf_package(path: Path) -> None:
    from gguf import GGUFReader

    theirs = GGUFReader(path)
    with GGUFFile(path) as ours:
        fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        assert ours.version == theirs.fields["GGUF.version"].contents()
        for name, field in fields.items():
            got = ours.metadata[name]
            if isinstance(got, np.ndarray):
                parts = np.concatenate([field.parts[i] for i in field.data])
                assert got.dtype == parts.dtype
                assert np.array_equal(got, parts)
            elif isinstance(got, StringArray):
                assert got.to_bytes_list() == [field.parts[i].tobytes() for i in field.data]
            else:
                assert got == field.contents()
                assert type(got) is type(field.contents())
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for expected in theirs.tensors:
            tensor = ours.tensors[expected.name]
            assert tensor.shape == tuple(reversed(expected.shape.tolist()))
            assert tensor.dtype.ggml_id == expected.tensor_type.value
            assert tensor.nbytes == expected.n_bytes
            assert np.array_equal(tensor.data.reshape(-1), expected.data.reshape(-1).view(np.uint8))


@pytest.mark.slow  # the gguf package takes seconds to read the file
@pytest.mark.smollm2
def test_smollm2_as_the_gguf_package_reads_it(smollm2_path: Path) -> None:
    assert_equal_to_gguf_package(smollm2_path)


@pytest.mark.slow
@pytest.mark.gemma3
def test_gemma3_as_the_gguf_package_reads_it(gemma3_path: Path) -> None:
    assert_equal_to_gguf_package(gemma3_path)


@pytest.mark.gemma3
def test_gemma3_vocabulary(gemma3_path: Path) -> None:
    """A string lost or split anywhere would shift all that follow."""
    with GGUFFile(gemma3_path) as file:
        tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
        assert len(tokens) == len(scores) == file.tensors["token_embd.weight"].shape[0] == 262144
        assert [tokens[i] for i in (0, 1, 2, 3, 105, 106)] == [
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<start_of_turn>",
            "<end_of_turn>",
        ]
        decoded = tokens.to_list()
        assert decoded[236743 : 236743 + 3] == [tokens[i] for i in range(236743, 236746)]
        assert len(set(decoded)) == 262144


@pytest.mark.smollm2
def test_smollm2_truncated_at_every_section(smollm2_path: Path, tmp_path: Path) -> None:
    """A download that broke off is refused wherever it broke off."""
    with smollm2_path.open("rb") as source:
        head = source.read(2_000_000)
    marks = [head.index(name) for name in (b"general.name", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges")]
    marks += [head.index(b"blk.0.attn_norm.weight"), head.index(b"blk.29.ffn_up.weight")]
    lengths = {
        4,
        7,
        8,
        15,
        16,
        23,
        24,
        32,
        *marks,
        *(m + 30 for m in marks),
        1_000_000,
        1_785_663,
        1_785_664,
        2_000_000,
    }
    cut = tmp_path / "cut.gguf"
    for length in sorted(lengths):
        cut.write_bytes(head[:length])
        with pytest.raises(ModelFormatError):
            GGUFFile(cut)
    # One byte short, as a sparse file.
    cut.write_bytes(head)
    os.truncate(cut, smollm2_path.stat().st_size - 1)
    with pytest.raises(ModelFormatError, match="truncated"):
        GGUFFile(cut)


def num_calls(action: Callable[[], object]) -> int:
    """How many functions it calls, those written in C too."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("path", ["smollm2_path", "gemma3_path"])
def test_opening_looks_at_no_string_by_itself(request: pytest.FixtureRequest, path: str) -> None:
    """Guards the start-up: a vocabulary of 49,000 or 262,000 strings costs calls for its tensors and keys only."""
    file: Path = request.getfixturevalue(path)
    with GGUFFile(file) as opened:
        names = len(opened.tensors) + len(opened.metadata)
    assert num_calls(lambda: GGUFFile(file).close()) < 100 * names < 49_000
