"""Dequantisation: bit for bit the `gguf` package's, in bounded memory, and RawTensor's ways to take rows."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from octavo.core.errors import UnsupportedModelError
from octavo.formats import DEQUANTIZABLE, GGUFFile, QuantType, RawTensor, dequantize
from octavo.formats.quants import CHUNK_VALUES

GGUF_TYPES = sorted((t for t in DEQUANTIZABLE if t is not QuantType.F64), key=lambda t: t.ggml_id or 0)
BLOCK_TYPES = [t for t in GGUF_TYPES if t.is_quantized]


def reference(data: np.ndarray, dtype: QuantType) -> np.ndarray:
    """What the `gguf` package makes of packed rows."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    with np.errstate(all="ignore"):
        if dtype is QuantType.F32:
            return data.view(np.float32)
        return gguf_dequantize(data, GGMLQuantizationType(dtype.ggml_id)).astype(np.float32)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    different = np.flatnonzero(got.view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32))
    assert different.size == 0, f"{different.size} values differ, the first at {different[0]}"


def random_rows(dtype: QuantType, rows: int, values: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, dtype.nbytes(values)), dtype=np.uint8)


def test_table_agrees_with_the_gguf_package() -> None:
    """A wrong block size would shift every tensor's extent."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    compared = 0
    for dtype in QuantType:
        if dtype.ggml_id is not None:
            assert GGMLQuantizationType(dtype.ggml_id).name == dtype.name
            assert GGML_QUANT_SIZES[GGMLQuantizationType(dtype.ggml_id)] == (dtype.block_size, dtype.block_bytes)
            compared += 1
    assert compared == 18
    assert {t.name for t in QuantType if t.ggml_id is None} == {"U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2"}


@pytest.mark.parametrize("dtype", GGUF_TYPES, ids=lambda t: t.name)
def test_random_blocks_bit_for_bit(dtype: QuantType) -> None:
    """Random bytes reach every code and scale, NaN and infinite ones too; bits of NaNs must agree as well."""
    data = random_rows(dtype, 2048, 1024)
    got = dequantize(data, dtype)
    assert np.isnan(got).any()
    assert np.isfinite(got).any()
    assert_same_bits(got, reference(data, dtype))


# Offsets of the float16 fields in a block.
HALVES = {
    QuantType.Q4_0: [0],
    QuantType.Q4_1: [0, 2],
    QuantType.Q5_0: [0],
    QuantType.Q5_1: [0, 2],
    QuantType.Q8_0: [0],
    QuantType.Q2_K: [80, 82],
    QuantType.Q3_K: [108],
    QuantType.Q4_K: [0, 2],
    QuantType.Q5_K: [0, 2],
    QuantType.Q6_K: [208],
}


@pytest.mark.parametrize("dtype", BLOCK_TYPES, ids=lambda t: t.name)
def test_special_scales_bit_for_bit(dtype: QuantType) -> None:
    """Every pair of special scale and minimum: zeros of both signs, subnormals, the largest, infinities, NaNs."""
    special = np.array(
        [0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFD55], dtype="<u2"
    )
    pairs = np.array([(a, b) for a in special for b in special], dtype="<u2")
    data = random_rows(dtype, len(pairs), dtype.block_size * 4, seed=1)
    blocks = data.reshape(len(pairs), 4, dtype.block_bytes)
    for column, at in enumerate(HALVES[dtype]):
        blocks[:, :, at : at + 2] = pairs[:, None, column : column + 1].view(np.uint8)
    got = dequantize(data, dtype)
    assert_same_bits(got, reference(data, dtype))
    finite = np.isfinite(pairs.view(np.float16)[:, : len(HALVES[dtype])].astype(np.float32)).all(axis=1)
    assert np.isfinite(got[finite]).all()
    assert finite.any()


@pytest.mark.parametrize("dtype", BLOCK_TYPES[:5], ids=lambda t: t.name)  # those it can quantise to
def test_blocks_that_the_gguf_package_quantised(dtype: QuantType) -> None:
    """Values survive a round trip to within the format's step: guards against a reference read the wrong way round."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.default_rng(2).normal(size=(8, 1024)).astype(np.float32)
    packed = quantize(values, GGMLQuantizationType(dtype.ggml_id))
    steps = {QuantType.Q8_0: 0.02, QuantType.Q5_0: 0.15, QuantType.Q5_1: 0.15}
    assert np.abs(dequantize(packed, dtype) - values).max() < steps.get(dtype, 0.35)


@pytest.mark.parametrize("dtype", GGUF_TYPES, ids=lambda t: t.name)
def test_chunk_edges_and_strides(dtype: QuantType) -> None:
    """Guards against values lost or repeated where one chunk ends and the next begins."""
    width = 4096
    rows = CHUNK_VALUES // width + 3
    data = random_rows(dtype, rows, width)
    expected = reference(data, dtype)
    assert_same_bits(dequantize(data, dtype), expected)
    assert_same_bits(dequantize(data[::-1], dtype), expected[::-1])
    assert_same_bits(dequantize(data[1::3], dtype), expected[1::3])
    # One row of more than a chunk.
    long = data.reshape(1, -1)
    assert_same_bits(dequantize(long, dtype), expected.reshape(1, -1))
    # A buffer at an odd address, as safetensors files have.
    odd = np.empty(data.nbytes + 1, dtype=np.uint8)[1:].reshape(data.shape)
    odd[...] = data
    assert_same_bits(dequantize(odd, dtype), expected)


def test_f64_is_rounded() -> None:
    values = np.array([[0.1, 1e300, -0.0, np.nan]])
    got = dequantize(values.view(np.uint8).reshape(1, -1), QuantType.F64)
    assert got[0, :3].tolist() == [np.float32(0.1), np.inf, 0.0]
    assert np.isnan(got[0, 3])


@pytest.mark.parametrize(
    "dtype",
    [t if t in (QuantType.Q4_1, QuantType.Q6_K) else pytest.param(t, marks=pytest.mark.slow) for t in BLOCK_TYPES],
    ids=lambda t: t.name,
)
def test_scratch_memory_is_bounded(dtype: QuantType) -> None:
    """A Gemma-sized embedding must not need a second copy of itself in scratch."""
    data = np.zeros((65536, dtype.nbytes(768)), dtype=np.uint8)
    out = np.empty((65536, 768), dtype=np.float32)  # 192 MiB, made before the count begins
    tensor = RawTensor("t", out.shape, dtype, data)
    tracemalloc.start()
    dequantize(data, dtype, out)
    contiguous = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    dequantize(data[::2], dtype, out[: len(out) // 2])
    strided = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    few = tensor.dequantize(np.arange(0, 65536, 16))
    gathered = tracemalloc.get_traced_memory()[1] - few.nbytes
    tracemalloc.stop()
    assert max(contiguous, strided, gathered) < 8 << 20


def test_no_warnings_from_special_values(recwarn: pytest.WarningsRecorder) -> None:
    for dtype in GGUF_TYPES:
        dequantize(random_rows(dtype, 64, 256), dtype)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_types_that_have_no_values_of_their_own(name: str) -> None:
    """Their scales lie elsewhere: to read them as plain numbers would be wrong without a word."""
    dtype = QuantType[name]
    tensor = RawTensor("w", (1, 8), dtype, np.zeros((1, dtype.nbytes(8)), dtype=np.uint8))
    with pytest.raises(UnsupportedModelError, match=f"'w': {name} weights cannot be dequantised; supported: F32"):
        tensor.dequantize()
    with pytest.raises(UnsupportedModelError, match=name):
        dequantize(tensor.data, dtype)


def test_wrong_arrays_are_refused() -> None:
    data = np.zeros((2, 36), dtype=np.uint8)
    with pytest.raises(ValueError, match="uint8"):
        dequantize(data.reshape(-1), QuantType.Q4_0)
    with pytest.raises(ValueError, match="uint8"):
        dequantize(data.view(np.int8), QuantType.Q4_0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks"):
        dequantize(data[:, :35], QuantType.Q4_0)
    for out in (np.empty((2, 32), np.float32), np.empty((2, 64)), np.empty((2, 128), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="out must be"):
            dequantize(data, QuantType.Q4_0, out)  # type: ignore[arg-type]
    assert dequantize(data[:0], QuantType.Q4_0).shape == (0, 64)


# RawTensor


@pytest.fixture
def matrix() -> RawTensor:
    return RawTensor("w", (10, 64), QuantType.Q4_0, random_rows(QuantType.Q4_0, 10, 64))


def test_dequantize_rows(matrix: RawTensor) -> None:
    whole = matrix.dequantize()
    assert whole.shape == (10, 64)
    assert_same_bits(matrix.dequantize(slice(2, 9, 3)), whole[2:9:3])
    for index in ([], [3], [9, 0, 3, 3], list(range(10))):
        assert_same_bits(matrix.dequantize(index), whole[np.array(index, dtype=int)])
    assert_same_bits(matrix.dequantize(np.array([1, 2], dtype=np.uint64)), whole[1:3])


def test_select_rows_keeps_bits(matrix: RawTensor) -> None:
    order = np.random.default_rng(3).permutation(10)
    taken = matrix.select_rows(order)
    assert (taken.name, taken.shape, taken.dtype) == ("w", (10, 64), QuantType.Q4_0)
    assert_same_bits(taken.dequantize(), matrix.dequantize()[order])
    assert not np.shares_memory(taken.data, matrix.data)
    inverse = np.argsort(order)
    assert np.array_equal(taken.select_rows(inverse).data, matrix.data)
    assert np.array_equal(taken.dequantize(slice(1, 3)), matrix.dequantize(order)[1:3])
    assert np.array_equal(taken.dequantize([3, 0]), matrix.dequantize(order)[[3, 0]])
    assert taken.nbytes == taken.data.nbytes
    assert matrix.select_rows([4]).shape == (1, 64)


def test_select_values_of_a_vector() -> None:
    bias = RawTensor("b", (4,), QuantType.F32, np.arange(4, dtype=np.float32).view(np.uint8).reshape(1, -1))
    taken = bias.select_rows([3, 1])
    assert taken.shape == (2,)
    assert taken.data.shape == (1, 8)
    assert taken.dequantize().tolist() == [3.0, 1.0]


def test_row_numbers_are_checked(matrix: RawTensor) -> None:
    """Negative numbers are no rows either: NumPy would count them from the end."""
    for method in (matrix.dequantize, matrix.select_rows):
        for bad in ([10], [-1], np.array([2**64 - 1], dtype=np.uint64)):
            with pytest.raises(IndexError, match=r"0\.\.9"):
                method(bad)
        for bad in ([0.0], [[1]], 3, [True]):
            with pytest.raises(ValueError, match="integers"):
                method(bad)
    vector = RawTensor("b", (64,), QuantType.Q4_0, matrix.data[:1])
    with pytest.raises(ValueError, match="matrix"):
        vector.dequantize([0])
    with pytest.raises(ValueError, match="no rows"):
        vector.select_rows([0])
    with pytest.raises(UnsupportedModelError):
        matrix.view()


# Real tensors


def assert_real_tensors(path: Path, wanted: set[str]) -> None:
    """One tensor of each type, and 999 spread rows of the embedding."""
    with GGUFFile(path) as file:
        by_type = {t.dtype.name: t for t in file.tensors.values() if t.size < 5_000_000}
        embedding = file.tensors["token_embd.weight"]
        assert {embedding.dtype.name, *by_type} == wanted
        for tensor in by_type.values():
            assert_same_bits(tensor.dequantize().reshape(len(tensor.data), -1), reference(tensor.data, tensor.dtype))
        rows = np.linspace(0, embedding.shape[0] - 1, 999).astype(int)
        assert_same_bits(embedding.dequantize(rows), reference(embedding.data[rows], embedding.dtype))


@pytest.mark.smollm2
def test_smollm2_tensors(smollm2_path: Path) -> None:
    assert_real_tensors(smollm2_path, {"F32", "Q4_1", "Q8_0"})


@pytest.mark.gemma3
def test_gemma3_tensors(gemma3_path: Path) -> None:
    assert_real_tensors(gemma3_path, {"F32", "Q5_0", "Q4_K", "Q6_K", "Q8_0"})


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.gemma3
@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_all_tensors(model: str, request: pytest.FixtureRequest) -> None:
    with GGUFFile(request.getfixturevalue(model)) as file:
        for tensor in file.tensors.values():
            for start in range(0, len(tensor.data), 16384):
                part = tensor.data[start : start + 16384]
                assert_same_bits(dequantize(part, tensor.dtype), reference(part, tensor.dtype))
