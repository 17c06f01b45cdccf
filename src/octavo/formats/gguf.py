"""Reader of GGUF files, versions 2 and 3, little-endian.

Format: magic, version, tensor count, key-value pairs, tensor infos, padding to `general.alignment`, tensor data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Nothing read from the file is used before it is checked
against what the file can hold, so a hostile or truncated file gives a ModelFormatError and costs no more than time and
memory in proportion to its size.

Text: keys and tensor names must be UTF-8. In single string values, bytes that are not UTF-8 are replaced by U+FFFD; in
string arrays they are kept (see StringArray).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ModelFormatError
from octavo.formats.mapping import ModelFile, map_file, printable
from octavo.formats.quants import GGML_TYPES, UNSUPPORTED_GGML_TYPES, QuantType
from octavo.formats.strings import locate_strings
from octavo.formats.tensor import RawTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits far above any real model (the largest vocabularies have some 10^6 strings in 2·10^7 bytes), so that what a file
# can make us do stays small.
MAX_HEADER_BYTES = 512 << 20  # everything before the tensor data
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ITEMS = 1 << 23  # strings in all arrays together: each costs one step of a loop
MAX_NESTED = 1 << 16  # arrays in arrays: each is an object, many times the size of an empty one in the file
MAX_NAME_BYTES = 65535  # the format's own limit on keys
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
MAX_VALUES = (1 << 63) - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Value type -> (struct of a scalar, NumPy type of an array's elements).
_NUMBERS: dict[int, tuple[struct.Struct, str]] = {
    0: (struct.Struct("<B"), "|u1"),
    1: (struct.Struct("<b"), "|i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (_U32, "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    _BOOL: (struct.Struct("<B"), "|b1"),
    10: (_U64, "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}
# The fewest bytes one key-value pair (key length, one letter, type, value) and one tensor info (name length, one
# letter, dimension count, one dimension, type, offset) can take: bounds on the counts.
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
_MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8


class GGUFFile(ModelFile):
    """An opened GGUF file. Opening reads the metadata and tensor infos; weights are mapped, not read.

    `metadata` values: int, float, bool, str; NumPy arrays (read-only views on the mapping, not necessarily aligned) for
    arrays of numbers; StringArray for arrays of strings; list for arrays of arrays.

    Raises ModelNotFoundError if there is no such file, ModelFormatError (naming the field) if it is not sound.
    """

    version: int  # 2 or 3
    alignment: int  # bytes; every tensor's data starts at a multiple of it

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        mapping = map_file(path)
        reader = _Reader(path, mapping)
        self.version, tensor_count, pair_count = _read_counts(reader)
        metadata = _read_metadata(reader, pair_count)
        self.alignment = _checked_alignment(reader, metadata)
        infos = [_read_info(reader, i, self.alignment) for i in range(tensor_count)]
        super().__init__(path, metadata, _locate_tensors(reader, infos, self.alignment), [mapping])


class _Reader:
    """A cursor over the mapping that never reads past the end of the file or of the allowed header."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.bytes: NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)  # read-only, as the mapping is
        self.position = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)
        self.items_left = MAX_ITEMS
        self.nested_left = MAX_NESTED

    def fail(self, field: str, message: str) -> NoReturn:
        raise ModelFormatError(self.path, field, message)

    def remaining(self) -> int:
        return self.end - self.position

    def take(self, size: int, field: str) -> int:
        """Offset of the next `size` bytes, which exist."""
        start = self.position
        if size > self.end - start:
            where = f"the file ends at byte {self.end}"
            if self.end < len(self.buffer):
                where = f"a header may have {self.end} bytes"
            self.fail(field, f"needs {size} bytes at offset {start}, and {where}")
        self.position = start + size
        return start

    def number(self, kind: struct.Struct, field: str) -> Any:
        return kind.unpack_from(self.buffer, self.take(kind.size, field))[0]

    def u32(self, field: str) -> int:
        return int(self.number(_U32, field))

    def u64(self, field: str) -> int:
        return int(self.number(_U64, field))

    def string(self, field: str) -> bytes:
        length = self.u64(field)
        if length > self.remaining():
            self.fail(field, f"string has length {length}, and {self.remaining()} bytes remain")
        start = self.take(length, field)
        return self.buffer[start : start + length]

    def name(self, field: str) -> str:
        raw = self.string(field)
        if not 0 < len(raw) <= MAX_NAME_BYTES:
            self.fail(field, f"must have 1 to {MAX_NAME_BYTES} bytes, not {len(raw)}")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(field, f"is not valid UTF-8: {raw[:40]!r}")


def _read_counts(reader: _Reader) -> tuple[int, int, int]:
    """Version, number of tensors, number of key-value pairs."""
    magic = reader.buffer[:4]
    if magic != MAGIC:
        reader.fail("magic", f"is {magic!r}, not {MAGIC!r}: not a GGUF file")
    reader.take(4, "magic")
    version = reader.u32("version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            reader.fail("version", "the file is big-endian; only little-endian GGUF is supported")
        reader.fail("version", f"{version} is not supported; versions 2 and 3 are")
    tensor_count = reader.u64("tensor_count")
    pair_count = reader.u64("metadata_kv_count")
    for field, count, limit, least in (
        ("tensor_count", tensor_count, MAX_TENSORS, _MIN_INFO_BYTES),
        ("metadata_kv_count", pair_count, MAX_KEYS, _MIN_PAIR_BYTES),
    ):
        if count > limit:
            reader.fail(field, f"{count} is more than the {limit} allowed")
        if count * least > reader.remaining():
            reader.fail(field, f"{count} entries need at least {count * least} bytes, and {reader.remaining()} remain")
    return version, tensor_count, pair_count


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = reader.name(f"metadata[{i}].key")
        field = printable(key)
        if key in metadata:
            reader.fail(field, "the key occurs twice")
        kind = reader.u32(field)
        metadata[key] = _read_value(reader, field, kind)
        if key == "general.alignment" and kind != 4:
            reader.fail(field, f"must be of type uint32 (4), not {kind}")
    return metadata


def _read_value(reader: _Reader, field: str, kind: int) -> Any:
    if kind == _STRING:
        return reader.string(field).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _read_array(reader, field, 1)
    if kind not in _NUMBERS:
        reader.fail(field, f"unknown value type {kind}")
    value = reader.number(_NUMBERS[kind][0], field)
    if kind == _BOOL:
        if value > 1:
            reader.fail(field, f"a boolean must be 0 or 1, not {value}")
        return bool(value)
    return value


def _read_array(reader: _Reader, field: str, depth: int) -> Any:
    if depth > MAX_ARRAY_DEPTH:
        reader.fail(field, f"arrays are nested deeper than {MAX_ARRAY_DEPTH}")
    kind = reader.u32(field)
    count = reader.u64(field)
    if kind in _NUMBERS:
        least = _NUMBERS[kind][0].size
    elif kind == _STRING:
        least = 8  # a length
    elif kind == _ARRAY:
        least = 12  # a type and a count
    else:
        reader.fail(field, f"unknown array element type {kind}")
    if count * least > reader.remaining():
        reader.fail(field, f"{count} elements need at least {count * least} bytes, and {reader.remaining()} remain")
    if kind in _NUMBERS:
        start = reader.take(count * least, field)
        raw = reader.bytes[start : start + count * least]
        if kind == _BOOL and count and raw.max() > 1:
            reader.fail(field, "booleans must be 0 or 1")
        return raw.view(_NUMBERS[kind][1])
    if kind == _ARRAY:
        if count > reader.nested_left:
            reader.fail(field, f"the file's arrays hold more than {MAX_NESTED} arrays")
        reader.nested_left -= count
        return [_read_array(reader, field, depth + 1) for _ in range(count)]
    if count > reader.items_left:
        reader.fail(field, f"the file's arrays hold more than {MAX_ITEMS} strings")
    reader.items_left -= count
    strings, reader.position = locate_strings(reader.path, field, reader.buffer, reader.position, reader.end, count)
    return strings


def _checked_alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    # A power of two from 8 on is a multiple of 8, as the format wants.
    if alignment < 8 or alignment & (alignment - 1):
        reader.fail("general.alignment", f"must be a power of two and a multiple of 8, not {alignment}")
    return int(alignment)


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: tuple[int, ...]  # outermost first
    dtype: QuantType
    offset: int  # bytes from the start of the tensor data
    nbytes: int


def _read_info(reader: _Reader, index: int, alignment: int) -> _Info:
    name = reader.name(f"tensor_infos[{index}].name")
    field = printable(name)
    ndim = reader.u32(field)
    if not 1 <= ndim <= MAX_DIMS:
        reader.fail(field, f"must have 1 to {MAX_DIMS} dimensions, not {ndim}")
    dims = [reader.u64(field) for _ in range(ndim)]  # innermost first
    values = math.prod(dims)
    if not 0 < values <= MAX_VALUES:
        reader.fail(field, f"dimensions {dims} have {values} elements; 1 to {MAX_VALUES} are possible")
    type_id = reader.u32(field)
    dtype = GGML_TYPES.get(type_id)
    if dtype is None:
        known = UNSUPPORTED_GGML_TYPES.get(type_id, "unknown")
        supported = ", ".join(t.name for t in GGML_TYPES.values())
        reader.fail(field, f"tensor type {type_id} ({known}) is not supported; supported: {supported}")
    if dims[0] % dtype.block_size:
        reader.fail(field, f"rows of {dims[0]} values are not whole {dtype.name} blocks of {dtype.block_size}")
    offset = reader.u64(field)
    if offset % alignment:
        reader.fail(field, f"data offset {offset} is not a multiple of the alignment, {alignment}")
    return _Info(name, tuple(reversed(dims)), dtype, offset, dtype.nbytes(values))


def _locate_tensors(reader: _Reader, infos: list[_Info], alignment: int) -> dict[str, RawTensor]:
    """Check names and extents, and view each tensor's bytes on the mapping."""
    data_start = -(-reader.position // alignment) * alignment
    data_size = len(reader.buffer) - data_start  # negative if the file ends in the padding
    tensors: dict[str, RawTensor] = {}
    for info in infos:
        field = printable(info.name)
        if info.name in tensors:
            reader.fail(field, "the tensor name occurs twice")
        if info.nbytes > data_size - info.offset:
            reader.fail(
                field,
                f"{info.nbytes} bytes at data offset {info.offset} end past the file, which has {max(0, data_size)} "
                "bytes of tensor data; is it truncated?",
            )
        start = data_start + info.offset
        rows = math.prod(info.shape[:-1])
        data = reader.bytes[start : start + info.nbytes].reshape(rows, info.nbytes // rows)
        tensors[info.name] = RawTensor(info.name, info.shape, info.dtype, data)
    ordered = sorted(infos, key=lambda info: info.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            reader.fail(printable(after.name), f"its data overlaps that of {printable(before.name)}")
    return tensors
