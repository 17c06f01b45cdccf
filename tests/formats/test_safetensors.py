"""The safetensors reader: agreement with the `safetensors` package, every check, shards and links."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.core.errors import ModelFormatError, ModelNotFoundError
from octavo.formats import QuantType, SafetensorsFile, open_safetensors
from octavo.formats import safetensors as module

from .builder import entry, safetensors_file, sample_safetensors

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write_file


# What a sound file holds


def test_sample(write: Write) -> None:
    with SafetensorsFile(write(sample_safetensors())) as file:
        assert dict(file.metadata) == {"format": "pt"}
        assert list(file.tensors) == ["matrix", "scalar", "ints", "empty"]
        matrix = file.tensors["matrix"]
        assert (matrix.shape, matrix.dtype, matrix.data.shape) == ((2, 3), QuantType.F32, (2, 12))
        assert matrix.dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert matrix.dequantize([1]).tolist() == [[3, 4, 5]]
        scalar = file.tensors["scalar"]
        assert (scalar.shape, scalar.data.shape) == ((), (1, 2))
        assert scalar.dequantize() == np.float32(1.0)
        assert scalar.dequantize().shape == ()
        assert file.tensors["ints"].view().tolist() == [7, -8]
        empty = file.tensors["empty"]
        assert (empty.shape, empty.nbytes, empty.dequantize().shape) == ((0, 5), 0, (0, 5))


def test_every_type_as_the_safetensors_package_writes_it(tmp_path: Path) -> None:
    """Guards against a swapped type, shape or offset; header padding and unaligned data included."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    types = {
        torch.float64: QuantType.F64,
        torch.float32: QuantType.F32,
        torch.float16: QuantType.F16,
        torch.bfloat16: QuantType.BF16,
        torch.int8: QuantType.I8,
        torch.uint8: QuantType.U8,
        torch.int16: QuantType.I16,
        torch.uint16: QuantType.U16,
        torch.int32: QuantType.I32,
        torch.uint32: QuantType.U32,
        torch.int64: QuantType.I64,
        torch.uint64: QuantType.U64,
        torch.bool: QuantType.BOOL,
        torch.float8_e4m3fn: QuantType.F8_E4M3,
        torch.float8_e5m2: QuantType.F8_E5M2,
    }
    tensors = {str(t): (torch.randn(3, 5, 7) * 50).to(t) for t in types}
    save_file(tensors, tmp_path / "m.safetensors", {"k": "v"})
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert dict(file.metadata) == {"k": "v"}
        assert set(file.tensors) == set(tensors)
        for dtype, ours in types.items():
            tensor, expected = file.tensors[str(dtype)], tensors[str(dtype)]
            assert tensor.dtype is ours
            assert tensor.shape == (3, 5, 7)
            assert tensor.data.shape == (15, 7 * expected.element_size())
            assert tensor.data.tobytes() == expected.view(torch.uint8).numpy().tobytes()
            if expected.is_floating_point() and expected.element_size() > 1:
                assert np.array_equal(tensor.dequantize(), expected.to(torch.float32).numpy())
            elif ours.numpy_dtype is not None:
                assert np.array_equal(tensor.view(), expected.numpy())


def test_data_at_an_odd_offset(write: Write) -> None:
    header = json.dumps({"a": entry("F32", [2], 0, 8)}).encode()
    header += b" " * (1 - len(header) % 2)  # 8 + odd
    with SafetensorsFile(write(safetensors_file(header, struct.pack("<2f", 1.5, 2.5)))) as file:
        assert file.tensors["a"].data.ctypes.data % 2 == 1
        assert file.tensors["a"].dequantize().tolist() == [1.5, 2.5]


def test_order_of_data_is_free(write: Write) -> None:
    header = {"b": entry("U8", [2], 3, 5), "a": entry("U8", [3], 0, 3)}
    with SafetensorsFile(write(safetensors_file(header, b"aaabb"))) as file:
        assert file.tensors["b"].data.tobytes() == b"bb"
        assert list(file.tensors) == ["b", "a"]


def test_no_tensors(write: Write) -> None:
    with SafetensorsFile(write(safetensors_file({}))) as file:
        assert file.tensors == {}
    with pytest.raises(ValueError, match="closed"):
        file.tensors  # noqa: B018


# Broken files: content, field, part of the message


def one(data: bytes = b"\0" * 8, **changes: Any) -> bytes:
    return safetensors_file({"t": {**entry("F32", [2], 0, 8), **changes}}, data)


def two(a: dict[str, Any], b: dict[str, Any], size: int) -> bytes:
    return safetensors_file({"a": a, "b": b}, bytes(size))


GOOD = b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
BROKEN = {
    "no length": (b"\x02\0\0", "header length", "3 bytes"),
    "length 2^63": (safetensors_file({}, length=1 << 63), "header length", "allowed"),
    "length over the cap": (safetensors_file({}, length=100_000_001), "header length", "allowed"),
    "length past the end": (safetensors_file({}, length=3), "header length", "2 bytes follow"),
    "header empty": (safetensors_file(b""), "header", "must be a JSON object"),
    "header a list": (safetensors_file([]), "header", "must be a JSON object"),
    "header with a BOM": (safetensors_file(b"\xef\xbb\xbf{}"), "header", "must be a JSON object"),
    "header in UTF-16": (safetensors_file("{}".encode("utf-16-le")), "header", "not valid JSON"),
    "header not UTF-8": (safetensors_file(b'{"\xff":1}'), "header", "UTF-8"),
    "header cut": (safetensors_file(GOOD, b"\0"), "header", "not valid JSON"),
    "header followed by more": (safetensors_file(b"{}{}"), "header", "not valid JSON"),
    "header deep": (safetensors_file(b'{"a":' * 100_000), "header", "too deeply"),
    "header with NaN": (safetensors_file(b'{"t":NaN}'), "header", "NaN"),
    "header with a huge number": (safetensors_file(b'{"t":' + b"9" * 5000 + b"}"), "header", "too long"),
    "header with many brackets": (safetensors_file(b'{"t":[' + b"[],[]," * 600_000), "header", "brackets"),
    "header with many commas": (safetensors_file(b'{"t":[' + b"0," * 2_200_000), "header", "commas"),
    "name twice": (safetensors_file(GOOD + b"," + GOOD[1:] + b"}", b"\0"), "header", "'t' occurs twice"),
    "dtype twice": (safetensors_file(b'{"t":{"dtype":"U8","dtype":"U8"}}'), "header", "twice"),
    "lone surrogate": (safetensors_file(b'{"\\ud800":{}}'), "header", "not valid Unicode"),
    "metadata a list": (safetensors_file({"__metadata__": []}), "__metadata__", "object"),
    "metadata not strings": (safetensors_file({"__metadata__": {"a": 1}}), "__metadata__", "strings"),
    "tensor a string": (safetensors_file({"t": "x"}), "t", "must be an object"),
    "field missing": (safetensors_file({"t": {"dtype": "F32", "shape": []}}), "t", "must be an object"),
    "field unknown": (one(strides=[1]), "t", "must be an object"),
    "dtype unknown": (one(dtype="F4"), "t", "'F4' is not supported"),
    "dtype a block format": (one(dtype="Q4_0"), "t", "not supported"),
    "dtype a number": (one(dtype=5), "t", "not supported"),
    "shape a number": (one(shape=2), "t", "shape"),
    "shape negative": (one(shape=[-2]), "t", "shape"),
    "shape a float": (one(shape=[2.0]), "t", "shape"),
    "shape a boolean": (one(shape=[2, True]), "t", "shape"),
    "shape beyond 63 bits": (one(shape=[1 << 64]), "t", "shape"),
    "shape too long": (one(shape=[1] * 33), "t", "shape"),
    "shape product wraps": (one(shape=[1 << 32, 1 << 32, 2]), "t", "needs"),
    "shape zero and huge": (one(b"", shape=[0, 1 << 62], data_offsets=[0, 0]), "t", "too large"),
    "offsets missing one": (one(data_offsets=[0]), "t", "data_offsets"),
    "offsets negative": (one(data_offsets=[-8, 0]), "t", "data_offsets"),
    "offsets reversed": (one(data_offsets=[8, 0]), "t", "needs 8 bytes"),
    "offsets floats": (one(data_offsets=[0, 8.0]), "t", "data_offsets"),
    "offsets beyond 63 bits": (one(data_offsets=[1 << 63, (1 << 63) + 8]), "t", "data_offsets"),
    "shape against offsets": (one(shape=[3]), "t", "needs 12 bytes"),
    "dtype against offsets": (one(dtype="F16"), "t", "needs 4 bytes"),
    "data cut": (one(b"\0" * 7), "t", "truncated"),
    "data left over": (one(b"\0" * 9), "data_offsets", "end at 8"),
    "hole at the start": (one(b"\0" * 16, data_offsets=[8, 16]), "t", "hole"),
    "hole": (two(entry("U8", [2], 0, 2), entry("U8", [2], 3, 5), 5), "b", "hole"),
    "overlap": (two(entry("U8", [3], 0, 3), entry("U8", [3], 2, 5), 5), "b", "overlaps"),
    "same place": (two(entry("U8", [3], 0, 3), entry("U8", [3], 0, 3), 3), "b", "overlaps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(write: Write, name: str) -> None:
    """Each unsound field is refused by name, and none is used before it is checked."""
    content, field, message = BROKEN[name]
    path = write(content)
    with pytest.raises(ModelFormatError) as error:
        SafetensorsFile(path)
    assert error.value.field == field
    assert message in str(error.value)


def test_every_truncation_is_refused(write: Write) -> None:
    content = sample_safetensors()
    for length in range(1, len(content)):
        with pytest.raises(ModelFormatError):
            SafetensorsFile(write(content[:length]))
    SafetensorsFile(write(content)).close()


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ModelFormatError, match="empty"):
        SafetensorsFile(tmp_path / "empty.safetensors")
    with pytest.raises(ModelFormatError, match="directory"):
        SafetensorsFile(tmp_path)
    for path in (tmp_path / "absent.safetensors", tmp_path / "absent.json", tmp_path / "absent"):
        with pytest.raises(ModelNotFoundError):
            open_safetensors(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no model\.safetensors\.index\.json"):
        open_safetensors(tmp_path / "folder")


# Shards

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_shards(folder: Path, **changes: Any) -> Path:
    """Two shards with tensors a, b and c and their index; `changes` replace or (None) remove entries of its map."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {"__metadata__": {"format": "pt", "who": "a"}, "a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 1, 3)}
    second = {"__metadata__": {"format": "pt", "who": "b", "more": "x"}, "c": entry("F32", [1], 0, 4)}
    (folder / A).write_bytes(safetensors_file(first, b"abb"))
    (folder / B).write_bytes(safetensors_file(second, struct.pack("<f", 1.5)))
    weight_map = {k: v for k, v in {"c": B, "a": A, "b": A, **changes}.items() if v is not None}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": weight_map}))
    return index


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    for path in (tmp_path, index):
        with open_safetensors(path) as model:
            assert model.path == path
            assert list(model.tensors) == ["c", "a", "b"]
            assert model.tensors["b"].data.tobytes() == b"bb"
            assert model.tensors["c"].dequantize().tolist() == [1.5]
            assert dict(model.metadata) == {"format": "pt", "who": "a", "more": "x"}
            assert model.shards == (tmp_path / A, tmp_path / B)


def test_the_index_decides(tmp_path: Path) -> None:
    """A tensor that two shards hold comes from the one the index names; one it does not name is left out."""
    make_shards(tmp_path, a=B, b=None)
    (tmp_path / B).write_bytes(safetensors_file({"a": entry("U8", [1], 0, 1), "c": entry("U8", [1], 1, 2)}, b"AC"))
    with open_safetensors(tmp_path) as model:
        assert list(model.tensors) == ["c", "a"]
        assert model.tensors["a"].data.tobytes() == b"A"


def test_single_file_and_only_file(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(sample_safetensors())
    for path in (tmp_path, tmp_path / "other.safetensors"):
        with open_safetensors(path) as model:
            assert "matrix" in model.tensors
            assert model.shards == (tmp_path / "other.safetensors",)
    (tmp_path / "second.safetensors").write_bytes(sample_safetensors())
    with pytest.raises(ModelFormatError, match=r"index.json: is missing, and the folder has 2"):
        open_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_file({}))
    with open_safetensors(tmp_path) as model:
        assert model.shards == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../" + A, "bare file name"),
        ("/etc/passwd", "bare file name"),
        ("sub/" + A, "bare file name"),
        ("./" + A, "bare file name"),
        ("..", "bare file name"),
        (".", "bare file name"),
        ("", "bare file name"),
        ("..\\" + A, "bare file name"),
        ("C:x", "bare file name"),
        ("x\0.safetensors", "bare file name"),
        ("absent.safetensors", "is missing"),
        (5, "must be a string"),
        (["x"], "must be a string"),
    ],
)
def test_shard_names_stay_in_the_folder(tmp_path: Path, name: Any, message: str) -> None:
    """Guards against an index that makes the reader open files elsewhere."""
    make_shards(tmp_path)  # a file that "../" would reach
    make_shards(tmp_path / "model", a=name)
    with pytest.raises(ModelFormatError, match=message) as error:
        open_safetensors(tmp_path / "model")
    assert error.value.field == "weight_map"


@pytest.mark.parametrize(
    "index", [b"[]", b"", b"{}", b'{"weight_map":{}}', b'{"weight_map":[]}', b'{"weight_map":', b"\0" * 100, b"{" * 999]
)
def test_broken_index(tmp_path: Path, index: bytes) -> None:
    make_shards(tmp_path).write_bytes(index)
    with pytest.raises(ModelFormatError):
        open_safetensors(tmp_path)


def test_tensor_absent_from_its_shard(tmp_path: Path) -> None:
    """Left out: who needs it misses it, by name. Some indices list an output matrix that is tied and was not saved."""
    make_shards(tmp_path)
    with open_safetensors(tmp_path) as file:
        names = set(file.tensors)
    make_shards(tmp_path, d=A)
    with open_safetensors(tmp_path) as file:
        assert set(file.tensors) == names and "d" not in names


def test_too_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path)
    monkeypatch.setattr(module, "MAX_SHARDS", 1)
    with pytest.raises(ModelFormatError, match="2 shards"):
        open_safetensors(tmp_path)


# Links


def move_to(target: Path, link: Path, text: str | None = None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    link.rename(target)
    link.symlink_to(text or target)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    make_shards(tmp_path)
    move_to(tmp_path / "blob", tmp_path / A, "blob")
    open_safetensors(tmp_path).close()


@pytest.mark.parametrize("which", [A, "model.safetensors.index.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, which: str, relative: bool) -> None:
    model = tmp_path / "model"
    make_shards(model)
    move_to(tmp_path / "secret", model / which, "../secret" if relative else None)
    with pytest.raises(ModelFormatError, match="leaves the folder"):
        open_safetensors(model)


def test_link_of_the_single_file_out_of_the_folder(tmp_path: Path) -> None:
    """Refused where the folder was named, followed where the file itself was."""
    (tmp_path / "model").mkdir()
    link = tmp_path / "model" / "model.safetensors"
    (tmp_path / "elsewhere").write_bytes(sample_safetensors())
    link.symlink_to("../elsewhere")
    with pytest.raises(ModelFormatError, match="leaves the folder"):
        open_safetensors(tmp_path / "model")
    open_safetensors(link).close()


def test_dangling_and_circular_links(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / A).unlink()
    (tmp_path / A).symlink_to("nothing")
    with pytest.raises((ModelFormatError, ModelNotFoundError)):
        open_safetensors(tmp_path)
    (tmp_path / A).unlink()
    (tmp_path / A).symlink_to(A)
    with pytest.raises(ModelFormatError):
        open_safetensors(tmp_path)


def make_cache(tmp_path: Path) -> Path:
    """The layout of the Hugging Face cache; returns the snapshot."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    make_shards(snapshot)
    for i, name in enumerate((A, B, "model.safetensors.index.json")):
        move_to(repo / "blobs" / f"hash{i}", snapshot / name, f"../../blobs/hash{i}")
    return snapshot


def test_huggingface_cache_layout(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path)
    with open_safetensors(snapshot) as model:
        assert set(model.tensors) == {"a", "b", "c"}
    # Also through a link to the snapshot, and where the repository lies in a subfolder of it.
    (tmp_path / "alias").symlink_to(snapshot)
    open_safetensors(tmp_path / "alias").close()
    sub = snapshot / "sub"
    make_shards(sub)
    move_to(snapshot.parent.parent / "blobs" / "x", sub / A, "../../../blobs/x")
    open_safetensors(sub).close()


@pytest.mark.parametrize("target", ["../../secret", "../../../other/blobs/hash", "../../blobs/deep/hash", "../secret"])
def test_other_links_out_of_a_snapshot_are_refused(tmp_path: Path, target: str) -> None:
    """Only the repository's own blobs are at home: not its neighbours', nor other snapshots."""
    snapshot = make_cache(tmp_path)
    (snapshot / A).unlink()
    aim = Path(os.path.normpath(snapshot / target))
    aim.parent.mkdir(parents=True, exist_ok=True)
    aim.write_bytes(sample_safetensors())
    (snapshot / A).symlink_to(target)
    with pytest.raises(ModelFormatError, match="leaves the folder"):
        open_safetensors(snapshot)
