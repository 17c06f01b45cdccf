"""Builds small GGUF and safetensors files, sound by default and broken where a test asks for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


class Raw(bytes):
    """Bytes to write as they are in place of an encoded value."""


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def array(kind: int, items: Sequence[Any], count: int | None = None) -> Raw:
    """An array value: type, count, elements."""
    head = struct.pack("<IQ", kind, len(items) if count is None else count)
    return Raw(head + b"".join(value(kind, item) for item in items))


def value(kind: int, item: Any) -> bytes:
    if isinstance(item, Raw):
        return item
    if kind == STRING:
        return string(item)
    return struct.pack("<" + _CODES[kind], item)


@dataclass
class Tensor:
    name: str | bytes
    dims: Sequence[int]  # as in the file: innermost first
    type_id: int
    data: bytes
    offset: int | None = None  # default: after the tensor before, aligned
    ndim: int | None = None


def gguf_file(
    metadata: Sequence[tuple[str | bytes, int, Any]] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    pieces = [
        magic,
        struct.pack("<I", version),
        struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count),
        struct.pack("<Q", len(metadata) if pair_count is None else pair_count),
    ]
    for key, kind, item in metadata:
        pieces += [string(key), struct.pack("<I", kind), value(kind, item)]
    blob = bytearray()
    for tensor in tensors:
        blob += bytes(-len(blob) % alignment)
        offset = len(blob) if tensor.offset is None else tensor.offset
        pieces.append(string(tensor.name))
        pieces.append(struct.pack("<I", len(tensor.dims) if tensor.ndim is None else tensor.ndim))
        pieces.append(b"".join(struct.pack("<Q", d) for d in tensor.dims))
        pieces.append(struct.pack("<IQ", tensor.type_id, offset))
        if tensor.offset is None:
            blob += tensor.data
    header = b"".join(pieces)
    return header + bytes(-len(header) % alignment) + bytes(blob) if tensors else header


def sample_gguf() -> bytes:
    """A small file with every kind of value and three tensors (F32 [3], Q4_0 [2, 64], Q6_K [1, 256])."""
    scalars: list[tuple[str | bytes, int, Any]] = [
        ("u8", U8, 200),
        ("i8", I8, -100),
        ("u16", U16, 60000),
        ("i16", I16, -30000),
        ("u32", U32, 4_000_000_000),
        ("i32", I32, -2_000_000_000),
        ("f32", F32, 0.5),
        ("bool", BOOL, 1),
        ("u64", U64, (1 << 64) - 1),
        ("i64", I64, -(1 << 63)),
        ("f64", F64, 0.1),
        ("string", STRING, "héllo"),
    ]
    arrays: list[tuple[str | bytes, int, Any]] = [
        ("array.u8", ARRAY, array(U8, [1, 2, 255])),
        ("array.i32", ARRAY, array(I32, [-1, 2, 3])),
        ("array.f32", ARRAY, array(F32, [0.5, -1.5])),
        ("array.f64", ARRAY, array(F64, [0.1])),
        ("array.bool", ARRAY, array(BOOL, [1, 0, 1])),
        ("array.empty", ARRAY, array(U64, [])),
        ("array.string", ARRAY, array(STRING, ["", "a", "日本語", "🙂", "b" * 300])),
        ("array.nested", ARRAY, array(ARRAY, [array(I16, [1, 2]), array(STRING, ["x"]), array(ARRAY, [])])),
    ]
    tensors = [
        Tensor("norm", [3], 0, struct.pack("<3f", 1.0, -2.0, 3.5)),
        Tensor("linear", [64, 2], 2, bytes(range(72))),
        Tensor("super", [256, 1], 14, bytes(range(210))),
    ]
    return gguf_file(scalars + arrays, tensors)


def safetensors_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """`header` is a JSON value, or bytes to write as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def sample_safetensors() -> bytes:
    """F32 [2, 3], BF16 scalar, I64 [2], and an empty F16 [0, 5]; with metadata."""
    header = {
        "__metadata__": {"format": "pt"},
        "matrix": entry("F32", [2, 3], 0, 24),
        "scalar": entry("BF16", [], 24, 26),
        "ints": entry("I64", [2], 26, 42),
        "empty": entry("F16", [0, 5], 42, 42),
    }
    data = struct.pack("<6f", *range(6)) + b"\x80\x3f" + struct.pack("<2q", 7, -8)
    return safetensors_file(header, data)
