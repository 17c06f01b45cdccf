"""Reader of safetensors files, single and sharded.

Format: a uint64 header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, tensor
data (https://github.com/huggingface/safetensors#format). As in the original implementation, the tensors' data must fill
the rest of the file without holes or overlaps. A file that breaks a rule gives a ModelFormatError.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from octavo.core.errors import ModelFormatError, ModelNotFoundError
from octavo.core.model_folder import check_inside
from octavo.formats.mapping import ModelFile, map_file, printable
from octavo.formats.quants import QuantType
from octavo.formats.tensor import RawTensor

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000  # as in the original implementation
MAX_DIMS = 32
MAX_SHARDS = 4096
# A JSON value costs up to 100 times its text in memory, so brackets and commas are counted before parsing: room for
# some 260,000 tensors, or for as many entries of JSON text in the metadata.
MAX_BRACKETS = 1 << 20
MAX_COMMAS = 1 << 21

_DTYPES: dict[str, QuantType] = {
    t.name: t
    for t in (
        *(QuantType.F64, QuantType.F32, QuantType.F16, QuantType.BF16, QuantType.F8_E4M3, QuantType.F8_E5M2),
        *(QuantType.I8, QuantType.I16, QuantType.I32, QuantType.I64, QuantType.BOOL),
        *(QuantType.U8, QuantType.U16, QuantType.U32, QuantType.U64),
    )
}


class SafetensorsFile(ModelFile):
    """One opened safetensors file. `metadata` is its ``__metadata__``, str -> str, empty if there is none.

    Raises ModelNotFoundError if there is no such file, ModelFormatError (naming the field) if it is not sound.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        buffer = map_file(path)
        header, data_start = _read_header(path, buffer)
        metadata = header.pop("__metadata__", {})
        _check_metadata(path, metadata)
        super().__init__(path, metadata, _locate_tensors(path, buffer, header, data_start), [buffer])


class SafetensorsModel(ModelFile):
    """The tensors of one or more safetensors files as one mapping. `path` is what was opened.

    `metadata` merges those of the files; where they disagree, the first file in order of names holds.
    """

    shards: tuple[Path, ...]

    def __init__(
        self,
        path: Path,
        shards: tuple[Path, ...],
        metadata: Mapping[str, Any],
        tensors: dict[str, RawTensor],
        mappings: Sequence[mmap.mmap],
    ) -> None:
        super().__init__(path, metadata, tensors, mappings)
        self.shards = shards


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsModel:
    """Open a .safetensors file, an index file (.json), or a folder with either.

    In a folder, ``model.safetensors.index.json`` goes before ``model.safetensors``, and that before the only
    .safetensors file there is. An index decides which tensors there are, and from which shard each comes; one that its
    shard does not hold is left out.

    A file named by the caller may lie or link anywhere. What a folder or an index names must stay at home: a shard name
    is a bare file name, and a symbolic link may lead only to a file in the same folder or, as the Hugging Face cache
    lays models out (``<repo>/snapshots/<revision>/…`` -> ``<repo>/blobs/<hash>``), in the blobs of the same repository.

    Raises ModelNotFoundError if nothing can be opened there, ModelFormatError if something is not sound.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, False for a path that cannot be looked at
        found = find_in_folder(path)
        if found is None:
            raise ModelNotFoundError(f"{path}: the folder has no {INDEX_NAME} and no .safetensors file")
        check_inside(path, found.name)
        return _open_index(path, found) if found.suffix == ".json" else _open_single(path, found)
    return _open_index(path, path) if path.suffix == ".json" else _open_single(path, path)


def find_in_folder(folder: Path) -> Path | None:
    """The index or the single file that stands for a folder; None if it has no safetensors file.

    Raises ModelFormatError if there are several files and no index to say which belong together.
    """
    for name in (INDEX_NAME, SINGLE_NAME):
        if os.path.lexists(folder / name):
            return folder / name
    files = list_folder(folder, ".safetensors")
    if len(files) > 1:
        raise ModelFormatError(folder, INDEX_NAME, f"is missing, and the folder has {len(files)} .safetensors files")
    return folder / files[0] if files else None


def list_folder(folder: Path, suffix: str) -> list[str]:
    """Sorted names of the files in `folder` that end in `suffix`. Raises ModelFormatError if it cannot be read."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix == suffix)
    except OSError as error:
        raise ModelFormatError(folder, "folder", f"cannot be read: {error.strerror}") from None


def _open_single(opened: Path, file: Path) -> SafetensorsModel:
    with SafetensorsFile(file) as one:
        return SafetensorsModel(opened, (file,), one.metadata, one.tensors, one.mappings)


def _open_index(opened: Path, index: Path) -> SafetensorsModel:
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise ModelFormatError(index, "weight_map", f"names {len(names)} shards; {MAX_SHARDS} are allowed")
    metadata: dict[str, Any] = {}
    mappings: list[mmap.mmap] = []
    by_shard: dict[str, dict[str, RawTensor]] = {}
    paths = []
    for name in names:
        path = check_inside(index.parent, name, "weight_map")
        if not os.path.lexists(path):
            raise ModelFormatError(index, "weight_map", f"shard {printable(name)!r} is missing")
        with SafetensorsFile(path) as shard:
            by_shard[name] = shard.tensors
            mappings += shard.mappings
            metadata = {**shard.metadata, **metadata}
        paths.append(path)
    tensors: dict[str, RawTensor] = {}
    for tensor, name in weight_map.items():
        if tensor in by_shard[name]:
            tensors[tensor] = by_shard[name][tensor]
        else:  # some list a tied output matrix that was not saved; a model misses what it needs
            log.info("%s: %s is not in its shard, %s", index, printable(tensor), printable(name))
    return SafetensorsModel(opened, tuple(paths), metadata, tensors, mappings)


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map, tensor name -> shard name, checked as to types only."""
    buffer = map_file(path)
    if len(buffer) > MAX_HEADER_BYTES:
        raise ModelFormatError(path, "index", f"has {len(buffer)} bytes; {MAX_HEADER_BYTES} are allowed")
    weight_map = _parse_object(path, "index", buffer[:]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(path, "weight_map", "must be an object that is not empty")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ModelFormatError(path, "weight_map", f"the shard of {printable(tensor)!r} must be a string")
    return weight_map


def _read_header(path: Path, buffer: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset of the tensor data."""
    if len(buffer) < 8:
        raise ModelFormatError(path, "header length", f"the file has {len(buffer)} bytes, fewer than a header length")
    (length,) = struct.unpack_from("<Q", buffer, 0)
    if length > MAX_HEADER_BYTES:
        raise ModelFormatError(path, "header length", f"is {length}; {MAX_HEADER_BYTES} are allowed")
    if length > len(buffer) - 8:
        raise ModelFormatError(path, "header length", f"is {length}, and {len(buffer) - 8} bytes follow")
    return _parse_object(path, "header", buffer[8 : 8 + length]), 8 + length


def _parse_object(path: Path, field: str, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no lone surrogates in keys."""

    def fail(message: str) -> NoReturn:
        raise ModelFormatError(path, field, message)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            fail(f"key {printable(twice)!r} occurs twice")
        for key in result:
            if not key.isascii() and any("\ud800" <= c <= "\udfff" for c in key):
                fail(f"key {printable(key)!r} is not valid Unicode")
        return result

    if not raw.startswith(b"{"):
        fail("must be a JSON object")
    brackets, commas = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if brackets > MAX_BRACKETS or commas > MAX_COMMAS:
        fail(f"has {brackets} brackets and {commas} commas; {MAX_BRACKETS} and {MAX_COMMAS} are allowed")
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=lambda text: fail(f"{text} is not JSON"),
        )
    except UnicodeDecodeError:
        fail("is not valid UTF-8")
    except RecursionError:
        fail("is nested too deeply")
    except json.JSONDecodeError as error:
        fail(f"is not valid JSON: {error.msg} at byte {error.pos}")
    except ModelFormatError:
        raise
    except ValueError:  # an integer with more digits than Python converts
        fail("holds a number that is too long")
    return parsed  # an object, for it starts with a brace


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFormatError(path, "__metadata__", "must be an object whose values are strings")


def _locate_tensors(path: Path, buffer: mmap.mmap, header: dict[str, Any], data_start: int) -> dict[str, RawTensor]:
    data = np.frombuffer(buffer, dtype=np.uint8)[data_start:]
    tensors: dict[str, RawTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, info in header.items():
        dtype, shape, begin, end = _checked_info(path, printable(name), info)
        if end > len(data):
            raise ModelFormatError(
                path,
                printable(name),
                f"data_offsets end at {end}, and the file has {len(data)} bytes of tensor data; is it truncated?",
            )
        spans.append((begin, end, name))
        rows = math.prod(shape[:-1])
        row_bytes = (shape[-1] if shape else 1) * dtype.block_bytes
        tensors[name] = RawTensor(name, shape, dtype, data[begin:end].reshape(rows, row_bytes))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise ModelFormatError(path, printable(name), f"its data, from {begin} on, {what} what ends at {position}")
        position = end
    if position != len(data):
        raise ModelFormatError(path, "data_offsets", f"end at {position}, the file's tensor data at {len(data)}")
    return tensors


def _checked_info(path: Path, field: str, info: Any) -> tuple[QuantType, tuple[int, ...], int, int]:
    """dtype, shape and data offsets of one tensor, consistent with each other."""

    def fail(message: str) -> NoReturn:
        raise ModelFormatError(path, field, message)

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        fail("must be an object with dtype, shape and data_offsets")
    name, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        fail(f"dtype {printable(str(name))!r} is not supported; supported: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_size, shape)):
        fail(f"shape must be a list of at most {MAX_DIMS} non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        fail("data_offsets must be two non-negative integers")
    begin, end = offsets
    expected = math.prod(shape) * dtype.block_bytes
    if end - begin != expected:
        fail(f"shape {shape} of {dtype.name} needs {expected} bytes, and data_offsets {offsets} hold {end - begin}")
    # With a dimension of zero the others are free: no array can have just any.
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        fail(f"shape {shape} is too large")
    return dtype, tuple(shape), begin, end
