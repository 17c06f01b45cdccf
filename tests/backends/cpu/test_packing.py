"""Packed weights keep the file's values, bit for bit, and hardly grow."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from octavo import _C
from octavo.backends import cpu
from octavo.backends.cpu import FORMATS, CpuOps
from octavo.formats import QuantType, RawTensor
from tests.backends.cpu.harness import FLOATS, array, bits_equal, granularity, random_tensor, run_linear, unpacked

SPECIAL = np.array(
    [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D55, 0x3C00], np.uint16
).view(np.float16)  # zeros, denormals, least and largest normals, infinities, NaN


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps(threads=3)


def round_trip(ops: CpuOps, tensor: RawTensor) -> None:
    weight = ops.linear_weight([tensor])
    outputs, inputs = tensor.shape
    bits_equal(unpacked(weight.packed, 0, 0, outputs, inputs), tensor.dequantize(), tensor.dtype.name)
    assert ops.weight_nbytes(tensor) == weight.packed.nbytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 50, 200])
def test_values_are_the_files(ops: CpuOps, name: str, outputs: int) -> None:
    """Guards against codes, high bits, scales or minimums of another group, output or half; 200 outputs are packed by
    several threads."""
    round_trip(ops, random_tensor(name, outputs, 2 * granularity(name) + (5 if name in FLOATS else 0)))
    if granularity(name) == 32:
        round_trip(ops, random_tensor(name, outputs, 32 * 9))


@pytest.mark.parametrize("name", FORMATS)
def test_special_scales(ops: CpuOps, name: str) -> None:
    """Zeros keep their sign, denormals their value, infinities and NaN stay what they are."""
    if name in FLOATS:
        width = QuantType[name].block_bytes
        data = np.random.default_rng(0).integers(0, 256, (33, 64 * width), dtype=np.uint8)
        round_trip(ops, RawTensor(name, (33, 64), QuantType[name], data))
    else:
        tensor = random_tensor(name, 33, 8 * granularity(name), scales=SPECIAL)
        values = tensor.dequantize()
        assert np.isnan(values).any() and np.isinf(values).any() and (np.signbit(values) & (values == 0)).any()
        round_trip(ops, tensor)


@pytest.mark.parametrize("name", FORMATS)
def test_all_bytes_random(ops: CpuOps, name: str) -> None:
    """A hostile file: any bytes at all pack and unpack."""
    kind = QuantType[name]
    inputs = 4 * granularity(name)
    data = np.random.default_rng(1).integers(0, 256, (20, kind.nbytes(inputs)), dtype=np.uint8)
    round_trip(ops, RawTensor(name, (20, inputs), kind, data))


def test_parts_of_different_formats(ops: CpuOps) -> None:
    """Neighbours of one format share a segment, whatever their number of outputs. Guards against a part packed over its
    neighbour in the panel that they share."""
    layout = [("Q4_1", 7), ("Q4_1", 20), ("Q6_K", 3), ("F16", 5), ("Q4_1", 18), ("Q4_1", 1), ("F32", 33), ("Q4_K", 16)]
    parts = [random_tensor(name, outputs, 512, seed=i) for i, (name, outputs) in enumerate(layout)]
    weight = ops.linear_weight(parts)
    assert weight.parts == tuple(outputs for _, outputs in layout) and weight.packed.outputs == 103
    segment, first = 0, 0
    for i, part in enumerate(parts):
        if i and part.dtype is not parts[i - 1].dtype:
            segment, first = segment + 1, 0
        bits_equal(unpacked(weight.packed, segment, first, part.shape[0], 512), part.dequantize(), f"part {i}")
        first += part.shape[0]


@pytest.mark.parametrize("name", FORMATS)
def test_packed_in_any_pieces(ops: CpuOps, name: str) -> None:
    """Guards against pieces that begin or end inside a panel."""
    tensor = random_tensor(name, 150, 256)
    packed = _C.Weight([(name, 150)], 256)
    at = 0
    for rows in (1, 14, 2, 16, 30, 87):
        _C.pack(ops.machine, [(packed, 0, np.ascontiguousarray(tensor.data[at : at + rows]), None, at)])
        at += rows
    assert at == 150
    bits_equal(unpacked(packed, 0, 0, 150, 256), tensor.dequantize())
    bits_equal(unpacked(packed, 0, 17, 100, 256), tensor.dequantize()[17:117])


@pytest.mark.parametrize("name", FORMATS)
def test_packed_in_another_order(ops: CpuOps, name: str) -> None:
    """Rows that are stored in another order than the tensor's, after others in the same panel."""
    tensor = random_tensor(name, 50, 256)
    order = np.random.default_rng(4).permutation(50)[:43]
    weight = ops.linear_weight([tensor, tensor.select_rows(order)])
    bits_equal(unpacked(weight.packed, 0, 0, 93, 256), np.concatenate([whole := tensor.dequantize(), whole[order]]))


@pytest.mark.parametrize("name", FORMATS)
def test_size(name: str) -> None:
    limit = 1.15 if name in ("Q4_0", "Q4_1", "Q4_K", "Q8_0") else 1.35
    for outputs, inputs in ((576, 1536), (64, 256), (16, 2048)):
        packed = _C.Weight([(name, outputs)], inputs)
        assert 1 <= packed.nbytes / QuantType[name].nbytes(outputs * inputs) <= limit


@pytest.mark.parametrize("name", [*FORMATS, "F64"])
def test_float32_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """compute_dtype float32 keeps dequantised values; a type without kernels (F64) is always kept so. Made a few rows
    at a time: guards against rows lost between."""
    monkeypatch.setattr(cpu, "_PACK_BYTES", 4 * 256 * 7)
    if name == "F64":
        ops = CpuOps(threads=1)
        values = array(40, 256).astype(np.float64)
        tensor = RawTensor("w", (40, 256), QuantType.F64, values.view(np.uint8))
    else:
        ops = CpuOps(threads=1, compute_dtype="float32")
        tensor = random_tensor(name, 40, 256)
    weight = ops.linear_weight([tensor])
    bits_equal(unpacked(weight.packed, 0, 0, 40, 256), tensor.dequantize())
    plain = name in FLOATS  # kept as they are: they compute in float32 anyway
    assert weight.packed.nbytes == 48 * 256 * (QuantType[name].block_bytes if plain else 4)
    assert ops.weight_nbytes(tensor) == weight.packed.nbytes


def test_vectors(ops: CpuOps) -> None:
    tensor = RawTensor("n", (48,), QuantType.F32, array(48).view(np.uint8).reshape(1, -1))
    np.testing.assert_array_equal(ops.vector_weight(tensor, 1.0), tensor.dequantize() + np.float32(1))
    assert ops.weight_nbytes(tensor) == 48 * 4


def test_deferred_packing_is_the_same() -> None:
    """Weights noted first and packed at once, in another thread, as when a model is loaded."""
    ops = CpuOps(threads=2)
    tensors = [random_tensor(name, 96, 256) for name in ("Q4_1", "Q8_0", "F16")]
    expected = [ops.linear_weight([tensor]) for tensor in tensors]
    packing = ops.defer_packing()
    weights = [ops.linear_weight([tensor]) for tensor in tensors]
    thread = threading.Thread(target=packing.pack)
    thread.start()
    thread.join()
    packing.end()
    later = ops.linear_weight([tensors[0]])
    x = array(3, 256)
    for weight, one in zip([*weights, later], [*expected, expected[0]], strict=True):
        bits_equal(run_linear(ops, weight, x), run_linear(ops, one, x))
        assert np.any(run_linear(ops, weight, x))
