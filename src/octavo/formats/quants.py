"""Weight types of model files, and their dequantisation to float32.

A tensor's last dimension is stored in blocks: `block_size` values in `block_bytes` bytes. The layouts are those of
ggml (``block_q4_0`` … ``block_q6_K``); all fields are little-endian. Arithmetic is float32, one rounding per operation
and in the order written here (scale × code, then minimum), so the result is bit for bit that of the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import UnsupportedModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Values decoded at a time. Scratch is a few float32 and uint8 arrays of this size, about 4 MiB, whatever the tensor.
CHUNK_VALUES = 1 << 18


class QuantType(Enum):
    """How values are stored. Plain types are blocks of one value; `numpy_dtype` is None where NumPy has no such type.

    `ggml_id` is the type's number in GGUF files; None for types that only safetensors files have.
    """

    F32 = ("F32", 0, 1, 4, "<f4")
    F16 = ("F16", 1, 1, 2, "<f2")
    BF16 = ("BF16", 30, 1, 2, None)
    F64 = ("F64", 28, 1, 8, "<f8")
    Q4_0 = ("Q4_0", 2, 32, 18, None)
    Q4_1 = ("Q4_1", 3, 32, 20, None)
    Q5_0 = ("Q5_0", 6, 32, 22, None)
    Q5_1 = ("Q5_1", 7, 32, 24, None)
    Q8_0 = ("Q8_0", 8, 32, 34, None)
    Q2_K = ("Q2_K", 10, 256, 84, None)
    Q3_K = ("Q3_K", 11, 256, 110, None)
    Q4_K = ("Q4_K", 12, 256, 144, None)
    Q5_K = ("Q5_K", 13, 256, 176, None)
    Q6_K = ("Q6_K", 14, 256, 210, None)
    I8 = ("I8", 24, 1, 1, "|i1")
    I16 = ("I16", 25, 1, 2, "<i2")
    I32 = ("I32", 26, 1, 4, "<i4")
    I64 = ("I64", 27, 1, 8, "<i8")
    U8 = ("U8", None, 1, 1, "|u1")
    U16 = ("U16", None, 1, 2, "<u2")
    U32 = ("U32", None, 1, 4, "<u4")
    U64 = ("U64", None, 1, 8, "<u8")
    BOOL = ("BOOL", None, 1, 1, "|b1")
    F8_E4M3 = ("F8_E4M3", None, 1, 1, None)
    F8_E5M2 = ("F8_E5M2", None, 1, 1, None)

    def __init__(
        self, label: str, ggml_id: int | None, block_size: int, block_bytes: int, numpy_dtype: str | None
    ) -> None:
        # The label keeps the values distinct: Enum would make types with equal values aliases of each other.
        self.label = label
        self.ggml_id = ggml_id
        self.block_size = block_size  # values per block
        self.block_bytes = block_bytes  # bytes per block
        self.numpy_dtype = numpy_dtype

    @property
    def is_quantized(self) -> bool:
        """True for the block formats, whose values share scales."""
        return self.block_size > 1

    def nbytes(self, count: int) -> int:
        """Bytes of `count` values; `count` must be a multiple of the block size."""
        return count // self.block_size * self.block_bytes


GGML_TYPES: dict[int, QuantType] = {t.ggml_id: t for t in QuantType if t.ggml_id is not None}

# Types that GGUF files may have and Octavo does not read; named so that an error can say which it was.
UNSUPPORTED_GGML_TYPES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


# Decoders: blocks uint8 [n, block_bytes] -> out float32 [n, block_size], C-contiguous, written in full.

_NIBBLES = np.array([0, 4], dtype=np.uint8)  # shifts that take the low and the high half of a byte
_PAIRS = np.array([0, 2, 4, 6], dtype=np.uint8)
_BITS = np.arange(8, dtype=np.uint8)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Any:
    """[n, k] bytes -> [n, 2k] codes: all low halves, then all high halves."""
    n, k = packed.shape
    return ((packed[:, None, :] >> _NIBBLES[:, None]) & 15).reshape(n, 2 * k)


def _nibbles_with_fifth_bit(high: Bytes, packed: Bytes) -> Any:
    """Codes of 0..31: low four bits from `packed` [n, 16], the fifth from bit i of `high` [n, 4] (little-endian)."""
    return _nibbles(packed) | (np.unpackbits(high, axis=1, bitorder="little") << 4)


def _decode_f32(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f4")


def _decode_f16(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f2")


def _decode_f64(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f8")


def _decode_bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _decode_q4_0(blocks: Bytes, out: Floats) -> None:
    np.subtract(_nibbles(blocks[:, 2:]), np.float32(8), out=out, dtype=np.float32)
    np.multiply(_half(blocks, 0), out, out=out)


def _decode_q4_1(blocks: Bytes, out: Floats) -> None:
    np.multiply(_half(blocks, 0), _nibbles(blocks[:, 4:]), out=out)
    np.add(out, _half(blocks, 2), out=out)


def _decode_q5_0(blocks: Bytes, out: Floats) -> None:
    np.subtract(_nibbles_with_fifth_bit(blocks[:, 2:6], blocks[:, 6:]), np.float32(16), out=out, dtype=np.float32)
    np.multiply(_half(blocks, 0), out, out=out)


def _decode_q5_1(blocks: Bytes, out: Floats) -> None:
    np.multiply(_half(blocks, 0), _nibbles_with_fifth_bit(blocks[:, 4:8], blocks[:, 8:]), out=out)
    np.add(out, _half(blocks, 2), out=out)


def _decode_q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(_half(blocks, 0), blocks[:, 2:].view(np.int8), out=out)


def _decode_q2_k(blocks: Bytes, out: Floats) -> None:
    """16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum: scales[16], codes[64], d, dmin."""
    n = len(blocks)
    scales = blocks[:, :16]
    scale = (_half(blocks, 80) * (scales & 15))[:, :, None]  # [n, 16, 1]
    minimum = (_half(blocks, 82) * (scales >> 4))[:, :, None]
    codes = (blocks[:, 16:80].reshape(n, 2, 1, 32) >> _PAIRS[:, None]) & 3  # [n, half, shift, 32]
    o = out.reshape(n, 16, 16)
    np.multiply(scale, codes.reshape(n, 16, 16), out=o)
    np.subtract(o, minimum, out=o)


def _decode_q3_k(blocks: Bytes, out: Floats) -> None:
    """16 sub-blocks of 16 with a 6-bit scale less 32: high bits[32], low 2 bits[64], scales[12], d.

    A code is its low bits, less 4 where its high bit is clear. Scale k has its low four bits in nibble k of the first
    eight scale bytes (low halves first) and its high two bits at 2·(k // 4) of byte 8 + k % 4.
    """
    n = len(blocks)
    high_bits = (blocks[:, 104:108].reshape(n, 1, 4) >> _PAIRS[:, None]) & 3
    scales = _nibbles(blocks[:, 96:104]) | (high_bits.reshape(n, 16) << 4)
    scale = (_half(blocks, 108) * (scales.astype(np.float32) - 32))[:, :, None]  # [n, 16, 1]
    low = (blocks[:, 32:96].reshape(n, 2, 1, 32) >> _PAIRS[:, None]) & 3  # [n, half, shift, 32]
    bit = (blocks[:, :32].reshape(n, 1, 32) >> _BITS[:, None]) & 1  # [n, half·4 + shift, 32]
    codes = low.reshape(n, 16, 16) | (bit.reshape(n, 16, 16) << 2)
    o = out.reshape(n, 16, 16)
    np.subtract(codes, np.float32(4), out=o, dtype=np.float32)
    np.multiply(scale, o, out=o)


def _scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K: d, dmin, then eight 6-bit scales and eight 6-bit minimums in twelve bytes; each [n, 8, 1].

    Bytes 0-3 hold scales 0-3, bytes 4-7 minimums 0-3, in their low six bits. Scale and minimum 4 + i have their low
    four bits in the halves of byte 8 + i and their high two bits on top of bytes i and 4 + i.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minimums = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return (_half(blocks, 0) * scales)[:, :, None], (_half(blocks, 2) * minimums)[:, :, None]


def _decode_q4_k(blocks: Bytes, out: Floats) -> None:
    """Eight sub-blocks of 32: d, dmin, scales[12], codes[128], two sub-blocks in the halves of 32 bytes."""
    n = len(blocks)
    scale, minimum = _scales_and_minimums(blocks)
    codes = (blocks[:, 16:].reshape(n, 4, 1, 32) >> _NIBBLES[:, None]) & 15
    o = out.reshape(n, 8, 32)
    np.multiply(scale, codes.reshape(n, 8, 32), out=o)
    np.subtract(o, minimum, out=o)


def _decode_q5_k(blocks: Bytes, out: Floats) -> None:
    """As Q4_K, with the fifth bit of sub-block s in bit s of 32 bytes: d, dmin, scales[12], high[32], codes[128]."""
    n = len(blocks)
    scale, minimum = _scales_and_minimums(blocks)
    codes = ((blocks[:, 48:].reshape(n, 4, 1, 32) >> _NIBBLES[:, None]) & 15).reshape(n, 8, 32)
    codes |= ((blocks[:, 16:48].reshape(n, 1, 32) >> _BITS[:, None]) & 1) << 4
    o = out.reshape(n, 8, 32)
    np.multiply(scale, codes, out=o)
    np.subtract(o, minimum, out=o)


def _decode_q6_k(blocks: Bytes, out: Floats) -> None:
    """16 sub-blocks of 16 with an int8 scale: low four bits[128], high two bits[64], scales[16], d; codes less 32."""
    n = len(blocks)
    scale = (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]  # [n, 16, 1]
    low = (blocks[:, :128].reshape(n, 2, 1, 64) >> _NIBBLES[:, None]) & 15  # [n, half, shift, 64]
    high = (blocks[:, 128:192].reshape(n, 2, 1, 32) >> _PAIRS[:, None]) & 3  # [n, half, shift, 32]
    codes = low.reshape(n, 16, 16) | (high.reshape(n, 16, 16) << 4)
    o = out.reshape(n, 16, 16)
    np.subtract(codes, np.float32(32), out=o, dtype=np.float32)
    np.multiply(scale, o, out=o)


_DECODERS: dict[QuantType, Callable[[Bytes, Floats], None]] = {
    QuantType.F32: _decode_f32,
    QuantType.F16: _decode_f16,
    QuantType.BF16: _decode_bf16,
    QuantType.F64: _decode_f64,
    QuantType.Q4_0: _decode_q4_0,
    QuantType.Q4_1: _decode_q4_1,
    QuantType.Q5_0: _decode_q5_0,
    QuantType.Q5_1: _decode_q5_1,
    QuantType.Q8_0: _decode_q8_0,
    QuantType.Q2_K: _decode_q2_k,
    QuantType.Q3_K: _decode_q3_k,
    QuantType.Q4_K: _decode_q4_k,
    QuantType.Q5_K: _decode_q5_k,
    QuantType.Q6_K: _decode_q6_k,
}

DEQUANTIZABLE: frozenset[QuantType] = frozenset(_DECODERS)


def dequantize(data: NDArray[np.uint8], dtype: QuantType, out: NDArray[np.float32] | None = None) -> Floats:
    """Packed rows, uint8 [rows, bytes_per_row], to float32 [rows, values_per_row].

    `data` may be a view with any row stride; `out`, if given, is written and returned, and must be C-contiguous.
    Scratch memory does not grow with the tensor. F64 is rounded to float32; every other supported type is exact up to
    the format's own arithmetic. Infinite and NaN scales give what IEEE 754 gives, without warnings.

    Raises UnsupportedModelError for integer, boolean and 8-bit float types, whose scales are not in the tensor, and
    ValueError if the shapes or types of the arrays do not fit.
    """
    decode = _DECODERS.get(dtype)
    if decode is None:
        supported = ", ".join(t.name for t in _DECODERS)
        raise UnsupportedModelError(f"{dtype.name} weights cannot be dequantised; supported: {supported}")
    _check_packed(data, dtype)
    rows, row_bytes = data.shape
    values = row_bytes // dtype.block_bytes * dtype.block_size
    if out is None:
        out = np.empty((rows, values), dtype=np.float32)
    elif out.shape != (rows, values) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be a C-contiguous float32 array of shape {(rows, values)}")
    if out.size == 0:
        return out
    with np.errstate(all="ignore"):
        if data.flags.c_contiguous:
            _decode_chunks(decode, dtype, data, out)
        else:
            step = max(1, CHUNK_VALUES // values)
            for start in range(0, rows, step):
                chunk = np.ascontiguousarray(data[start : start + step])
                _decode_chunks(decode, dtype, chunk, out[start : start + step])
    return out


def _decode_chunks(decode: Callable[[Bytes, Floats], None], dtype: QuantType, data: Bytes, out: Floats) -> None:
    """Decode contiguous `data` block range by block range, so that one long row needs no more scratch than many."""
    blocks: Any = data.reshape(-1, dtype.block_bytes)
    values = out.reshape(-1, dtype.block_size)
    step = CHUNK_VALUES // dtype.block_size
    for start in range(0, len(blocks), step):
        decode(blocks[start : start + step], values[start : start + step])


def _check_packed(data: Bytes, dtype: QuantType) -> None:
    if data.ndim != 2 or data.dtype != np.uint8:
        raise ValueError(f"packed data must be uint8 [rows, bytes_per_row], not {data.dtype} {data.shape}")
    if data.shape[1] % dtype.block_bytes:
        raise ValueError(f"rows of {data.shape[1]} bytes are not whole {dtype.name} blocks of {dtype.block_bytes}")
