"""The linear op: exact integer sums, activations quantised as documented, and bits that depend on a row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.backends.cpu import FORMATS, CpuOps
from octavo.backends.reference import ReferenceOps
from octavo.formats import QuantType, RawTensor
from tests.backends.cpu.harness import (
    CODES,
    FLOATS,
    INSTRUCTION_SETS,
    Floats,
    array,
    bits_equal,
    granularity,
    machine,
    machines,
    random_tensor,
    run_linear,
    vector,
)

INPUTS = {"short": 1, "some": 3, "long": 8}  # in units of 32, or 256 for formats with super-blocks


def quantised(x: Floats) -> tuple[NDArray[Any], Floats]:
    """int8 codes [rows, groups, 32] and scales [rows, groups, 1] of activations, in float32 as the kernels compute."""
    groups = x.reshape(len(x), -1, 32)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        steps = np.float32(127) / top
        steps = np.where(np.isfinite(steps) & (steps > 0), steps, np.float32(0))
        codes = np.where(steps > 0, np.rint(groups * steps), 0)
    return codes, top / np.float32(127)


def expected(x: Floats, tensor: RawTensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64 [rows, outputs] of what the kernel multiplies, and the sum of the magnitudes of its terms."""
    weights = tensor.dequantize().astype(np.float64)
    if tensor.dtype.name in CODES:
        codes, scales = quantised(x)
        values = (codes * scales.astype(np.float64)).reshape(x.shape)
    else:
        values = x.astype(np.float64)
    return values @ weights.T, np.abs(values) @ np.abs(weights).T


def weight_of(ops: CpuOps, name: str, outputs: int, inputs: int, bias: Floats | None = None) -> tuple[Any, RawTensor]:
    tensor = random_tensor(name, outputs, inputs)
    return ops.linear_weight([tensor], [] if bias is None else [vector(bias)]), tensor


def activations(rows: int, inputs: int, seed: int = 0) -> Floats:
    """Groups of very different size, one of zeros among them."""
    x = array(rows, inputs, seed=seed)
    x *= np.exp(2 * array(rows, inputs // 32, seed=seed + 1)).repeat(32, axis=1)
    x[:: max(rows // 3, 1), :32] = 0
    return x


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", FORMATS)
def test_against_float64(instruction_set: str, name: str) -> None:
    """Guards against wrong codes, scales, zero points and minimums, and groups of another row."""
    ops = machine(instruction_set)
    unit = granularity(name) if name in CODES else 32
    for outputs, inputs, rows in ((16, unit, 1), (50, 3 * unit, 20), (1, 8 * unit, 7), (33, 2048, 9)):
        weight, tensor = weight_of(ops, name, outputs, inputs)
        x = activations(rows, inputs)
        exact, magnitude = expected(x, tensor)
        got = run_linear(ops, weight, x)
        assert got.shape == (rows, outputs)
        assert (np.abs(got - exact) <= 2e-6 * magnitude + 1e-30).all(), np.abs(got - exact).max()
        residual = array(rows, outputs, seed=5)
        np.testing.assert_array_equal(run_linear(ops, weight, x, residual), got + residual)
        bias = array(outputs, seed=6)
        biased, _ = weight_of(ops, name, outputs, inputs, bias)
        np.testing.assert_array_equal(run_linear(ops, biased, x), got + bias)
        np.testing.assert_array_equal(run_linear(ops, biased, x, residual), (got + bias) + residual)


@pytest.mark.parametrize("name", FLOATS)
def test_any_number_of_inputs(name: str) -> None:
    """Plain weights are not bound to groups."""
    ops = machine("portable")
    for inputs in (1, 7, 33):
        weight, tensor = weight_of(ops, name, 5, inputs)
        x = array(3, inputs)
        exact, magnitude = expected(x, tensor)
        assert (np.abs(run_linear(ops, weight, x) - exact) <= 1e-6 * magnitude).all()


# --- activations ---


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_codes_of_activations(instruction_set: str) -> None:
    """With weights of scale 1 and one code of 1 a row, y is code * scale, rounded once: so each code is seen. Ties go
    to even; tiny, huge and zero groups."""
    ops = machine(instruction_set)
    blocks = np.zeros((32, 34), np.uint8)
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)
    blocks[np.arange(32), 2 + np.arange(32)] = 1
    identity = ops.linear_weight([RawTensor("i", (32, 32), QuantType.Q8_0, blocks)])
    ties = np.arange(-16, 16, dtype=np.float32) + np.float32(0.5)
    ties[0] = 127
    rows = [ties, np.zeros(32, np.float32), *activations(50, 32), array(32) * 1e30, array(32) * 1e-30]
    with np.errstate(over="ignore"):
        rows += [np.float32(value) * array(32, seed=2) for value in (3e38, 1e-37, 1e-38, 1e-44)]
        x = np.nan_to_num(np.array(rows, np.float32), posinf=3.4e38, neginf=-3.4e38)
    codes, scales = quantised(x)
    assert np.abs(codes).max() == 127 and (codes[0, 0, 1:5] == [-14, -14, -12, -12]).all()
    zero = np.float32(0)  # without its sign
    bits_equal(run_linear(ops, identity, x) + zero, (codes * scales).astype(np.float32).reshape(x.shape) + zero)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damage_shows(name: str, value: float) -> None:
    """NaN or infinity in a row makes all its outputs non-finite, alike on every instruction set, and touches no other
    row. Guards against damage that an int8 code hides."""
    outputs = []
    for note, ops in machines():
        inputs = 2 * granularity(name) if name in CODES else 64
        weight, _ = weight_of(ops, name, 20, inputs)
        x = array(5, inputs)
        clean = run_linear(ops, weight, x)
        assert np.isfinite(clean).all()
        x[2, 40] = value
        got = run_linear(ops, weight, x)
        assert not np.isfinite(got[2]).any(), note
        bits_equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], note)
        outputs.append(got)
    for got in outputs:
        bits_equal(got, outputs[0])


# --- integer sums ---

# Block bytes by format such that every scale is 1 and every minimum 0 (or 1 where `ones`); codes are filled in after.
SCALES: dict[str, tuple[slice, Any, Any]] = {
    "Q2_K": (slice(0, 16), 0x01, 0x11),
    "Q4_K": (slice(4, 16), [1] * 4 + [0] * 4 + [0x01] * 4, [1] * 8 + [0x11] * 4),
    "Q5_K": (slice(4, 16), [1] * 4 + [0] * 4 + [0x01] * 4, [1] * 8 + [0x11] * 4),
    "Q3_K": (slice(96, 108), [0x11] * 8 + [0xAA] * 4, None),  # 33 - 32
    "Q6_K": (slice(192, 208), 1, None),
}


def extreme_tensor(name: str, outputs: int, inputs: int, pattern: str, ones: bool) -> RawTensor:
    """Codes all greatest, all least, alternating by byte, or any; scales 1, minimums 0 or 1."""
    kind = QuantType[name]
    count = outputs * inputs // kind.block_size
    shape = (count, kind.block_bytes)
    if pattern == "random":
        blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    else:
        blocks = np.zeros(shape, np.uint8)
        greatest, least = (0x7F, 0x80) if name == "Q8_0" else (0xFF, 0x00)
        blocks[...] = least if pattern == "least" else greatest
        if pattern == "alternating":
            blocks[:, ::2] = least
    if name in SCALES:
        at, zero, one = SCALES[name]
        blocks[:, at] = one if ones and one is not None else zero
    halves = (0, 2) if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (80, 82) if name == "Q2_K" else ()
    scale = {"Q3_K": 108, "Q6_K": 208}.get(name, 0) if not halves else halves[0]
    blocks[:, scale : scale + 2] = np.array([1], np.float16).view(np.uint8)
    if halves:
        minimum = 1 if ones or name in SCALES else 0
        blocks[:, halves[1] : halves[1] + 2] = np.array([minimum], np.float16).view(np.uint8)
    return RawTensor(name, (outputs, inputs), kind, blocks.reshape(outputs, -1))


def extreme_rows(inputs: int) -> Floats:
    """Activations of which every code is 127, -127 or, in the last rows, anything: scale 1."""
    random = np.random.default_rng(0)
    k = np.arange(inputs)
    signs = [np.ones(inputs), -np.ones(inputs), (-1.0) ** k, -((-1.0) ** k), np.where(k // 4 % 2, 1, -1)]
    signs += [random.choice([-1, 1], inputs) for _ in range(3)]
    rows = [127 * sign for sign in signs]
    anything = random.integers(-127, 128, (3, inputs)).astype(np.float64)
    anything[:, ::32] = 127
    return np.array([*rows, *anything], np.float32)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("pattern", ["greatest", "least", "alternating", "random"])
@pytest.mark.parametrize("ones", [False, True])
def test_integer_sums_are_exact(instruction_set: str, name: str, pattern: str, ones: bool) -> None:
    """Every sum fits float32's 24 bits, so the result must be exact. Guards against int16 sums that saturate."""
    ops = machine(instruction_set)
    tensor = extreme_tensor(name, 17, 256, pattern, ones)
    weights = tensor.dequantize().astype(np.int64)
    assert (weights == tensor.dequantize()).all()
    low, high = {
        "Q2_K": (0, 3), "Q3_K": (-4, 3), "Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q6_K": (-32, 31), "Q8_0": (-128, 127),
    }.get(name, (0, 31 if name.startswith("Q5") else 15))  # fmt: skip
    minimum = 0 if weights.min() in (low, high) else 1 if name in ("Q4_1", "Q5_1") else -1
    if pattern in ("greatest", "least"):
        assert (weights - minimum == (high if pattern == "greatest" else low)).all()
    x = extreme_rows(256)
    exact = x.astype(np.int64) @ weights.T
    assert np.abs(exact).max() < 2**24
    weight = ops.linear_weight([tensor])
    np.testing.assert_array_equal(run_linear(ops, weight, x), exact)
    for row in range(len(x)):
        np.testing.assert_array_equal(run_linear(ops, weight, x[row : row + 1]), exact[row : row + 1])


# --- bits ---


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_same_among_others(instruction_set: str, name: str) -> None:
    """For every number of rows and place among them. Guards against a scalar tail, sums in another order, and fused
    multiplies where one instance of the kernel has none."""
    ops = machine(instruction_set)
    inputs = 512
    weight, _ = weight_of(ops, name, 40, inputs, array(40, seed=6))
    x, residual = activations(20, inputs), array(20, 40, seed=9)
    alone = np.concatenate([run_linear(ops, weight, x[i : i + 1], residual[i : i + 1]) for i in range(20)])
    for rows in range(1, 21):
        first = (20 - rows) // 2
        got = run_linear(ops, weight, x[first : first + rows], residual[first : first + rows])
        bits_equal(got, alone[first : first + rows], f"{rows} rows")


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_is_the_same_among_others(name: str) -> None:
    """For every number of outputs from 1 to 50. Guards against another way of computing for the last, partial panel,
    and outputs that are written past the end."""
    ops = machine("portable") if name in FLOATS else CpuOps(threads=1)
    tensor = random_tensor(name, 50, 256)
    x, residual, bias = activations(3, 256), array(3, 50, seed=9), array(50, seed=6)
    whole = run_linear(ops, ops.linear_weight([tensor], [vector(bias)]), x, residual)
    for outputs in range(1, 50):
        part = RawTensor("w", (outputs, 256), tensor.dtype, tensor.data[:outputs])
        weight = ops.linear_weight([part], [vector(bias[:outputs])])
        got = run_linear(ops, weight, x, np.ascontiguousarray(residual[:, :outputs]))
        bits_equal(got, whole[:, :outputs], f"{outputs} outputs")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 11])
def test_instruction_sets_and_threads_agree(name: str, rows: int) -> None:
    """Bit for bit; 300 outputs are cut over threads."""
    inputs = 512
    x, residual = activations(rows, inputs), array(rows, 300, seed=9)
    expected_bits = None
    for note, ops in machines():
        weight, _ = weight_of(ops, name, 300, inputs, array(300, seed=6))
        got = run_linear(ops, weight, x, residual)
        expected_bits = got if expected_bits is None else expected_bits
        bits_equal(got, expected_bits, note)


def test_parts_of_different_formats() -> None:
    """Parts side by side give what each gives alone, integer ones and plain ones in one weight too."""
    layout = [("Q4_K", 20), ("Q4_K", 7), ("Q6_K", 9), ("F16", 5), ("Q8_0", 16), ("F32", 3)]
    for note, ops in machines():
        tensors = [random_tensor(name, outputs, 256, seed=i) for i, (name, outputs) in enumerate(layout)]
        x, residual = activations(9, 256), array(9, 60, seed=9)
        biases = [vector(array(outputs, seed=20 + i)) for i, (_, outputs) in enumerate(layout)]
        got = run_linear(ops, ops.linear_weight(tensors, biases), x, residual)
        columns = np.split(residual, np.cumsum([outputs for _, outputs in layout])[:-1], axis=1)
        each = [
            run_linear(ops, ops.linear_weight([tensor], [bias]), x, np.ascontiguousarray(part))
            for tensor, bias, part in zip(tensors, biases, columns, strict=True)
        ]
        bits_equal(got, np.concatenate(each, axis=1), note)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_compute(name: str) -> None:
    """compute_dtype float32 multiplies dequantised weights by activations as they are."""
    ops = CpuOps(threads=2, compute_dtype="float32")
    tensor = random_tensor(name, 30, 512)
    x = activations(6, 512)
    weights = tensor.dequantize().astype(np.float64)
    got = run_linear(ops, ops.linear_weight([tensor]), x)
    assert (np.abs(got - x @ weights.T) <= 2e-6 * (np.abs(x) @ np.abs(weights).T)).all()


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "F32"])
def test_bias_against_the_reference(name: str) -> None:
    """The same handle on both backends, of parts each with its bias."""
    ops, reference = CpuOps(threads=2, compute_dtype="float32"), ReferenceOps("float64")
    tensors = [random_tensor(name, outputs, 64, seed=outputs) for outputs in (20, 7)]
    biases = [vector(array(outputs, seed=outputs) * 3) for outputs in (20, 7)]
    x, residual = activations(5, 64), array(5, 27, seed=9)
    theirs = reference.linear(x.astype(np.float64), reference.linear_weight(tensors, biases), residual)
    ours = run_linear(ops, ops.linear_weight(tensors, biases), x, residual)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    without = reference.linear(x.astype(np.float64), reference.linear_weight(tensors), residual)
    np.testing.assert_allclose(
        theirs - without, np.tile(np.concatenate([array(20, seed=20), array(7, seed=7)]) * 3, (5, 1))
    )


def test_no_rows() -> None:
    ops = CpuOps(threads=2)
    for name in ("Q4_1", "F16"):
        weight, _ = weight_of(ops, name, 20, 64)
        assert run_linear(ops, weight, np.empty((0, 64), np.float32)).shape == (0, 20)
