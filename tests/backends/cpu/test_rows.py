"""Ops on rows (norms, gates, rotations, embedding) against the reference backend, and their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import FORMATS, CpuOps
from octavo.backends.reference import ReferenceOps
from octavo.formats import QuantType, RawTensor
from octavo.ops import Activation, RopeConfig, RopeScaling
from tests.backends.batches import ragged
from tests.backends.cpu.harness import (
    INSTRUCTION_SETS,
    Floats,
    array,
    bits_equal,
    machine,
    machines,
    random_tensor,
)

RAGGED: dict[str, list[tuple[int, int]]] = {
    "one row": [(0, 1)],
    "mixed": [(0, 5), (7, 1), (3, 9), (12, 4), (0, 1), (900, 1)],
    "with empty ranges": [(0, 0), (5, 2), (6, 0), (0, 3), (4, 0)],
    "no sequences": [],
}
Op = Callable[[Any], Any]


def everywhere(op: Callable[[CpuOps], Floats]) -> Floats:
    """The op's result, which is the same bits on all instruction sets and numbers of threads."""
    results = [(note, op(ops)) for note, ops in machines()]
    for note, got in results:
        bits_equal(got, results[0][1], note)
    return results[0][1]


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (7, 1), (20, 576), (9, 100), (5, 3, 16), (2, 4, 7), (3, 1, 128)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    """Also per head, and of widths that no vector divides."""
    x, weight, residual = array(*shape), array(shape[-1], seed=1), array(*shape, seed=2)
    reference = ReferenceOps()
    for added in (None, residual):

        def norm(ops: CpuOps, added: Floats | None = added) -> Floats:
            r = None if added is None else ops.from_numpy(added)
            return ops.to_numpy(ops.rms_norm(ops.from_numpy(x), weight, 1e-5, r))

        expected = reference.rms_norm(x, weight, 1e-5, added)
        got = everywhere(norm)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros_and_of_damage() -> None:
    """A row of zeros gives zeros; NaN or infinity shows in its own row and in no other."""
    x = array(5, 40)
    x[1] = 0
    x[2, 3], x[3, 17] = np.nan, np.inf
    weight = np.ones(40, np.float32)
    got = everywhere(lambda ops: ops.to_numpy(ops.rms_norm(ops.from_numpy(x), weight, 1e-6)))
    assert (got[1] == 0).all() and np.isnan(got[2]).all() and np.isnan(got[3, 17])
    assert np.isfinite(got[[0, 4]]).all()


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("n", [1, 16, 64, 83])
def test_gated(activation: Activation, n: int) -> None:
    """From tiny to huge gates: guards against overflow on the way to a finite result."""
    big = np.array([1e-30, 1e-6, 0.1, 1, 5, 20, 87, 88, 89, 100, 1e3, 1e10, 1e20, 1e30, 3e38], np.float32)
    x = array(2 * len(big) + 20, 2 * n)
    x[: 2 * len(big), :n] = np.sign(x[: 2 * len(big), :n]) * np.repeat(big, 2)[:, None]
    with np.errstate(over="ignore"):
        expected = ReferenceOps("float64").gated(x.astype(np.float64), activation)
    keep = np.abs(expected) < 3e38  # else up may push it beyond float32
    got = everywhere(lambda ops: ops.to_numpy(ops.gated(ops.from_numpy(x), activation)))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got[keep], expected[keep], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("activation", list(Activation))
def test_gated_damage_shows(activation: Activation) -> None:
    x = array(4, 64)
    x[1, 5], x[2, 40], x[3, 6] = np.nan, np.nan, np.inf
    got = everywhere(lambda ops: ops.to_numpy(ops.gated(ops.from_numpy(x), activation)))
    assert (
        np.isnan(got[1, 5]) and np.isnan(got[2, 8]) and np.isinf(got[3, 6]) and np.isfinite(got).sum() == got.size - 3
    )
    none = CpuOps(threads=2)
    assert none.to_numpy(none.gated(none.from_numpy(np.empty((0, 64), np.float32)), activation)).shape == (0, 32)


def test_activations_are_accurate() -> None:
    """Relative to the exact value, over all gates from -87 to 87; guards against a coefficient of exp mistyped."""
    gate = np.linspace(-87, 87, 200_001, dtype=np.float32)[None]
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    got = everywhere(lambda ops: ops.to_numpy(ops.gated(ops.from_numpy(x), Activation.SILU)))
    exact = gate / (1 + np.exp(-gate.astype(np.float64)))
    assert np.abs(got / np.where(exact == 0, 1, exact) - 1)[exact != 0].max() < 5e-7


# --- rope ---


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(("head_dim", "dim"), [(16, 16), (64, 64), (64, 32), (16, 6), (128, 128)])
def test_rope(name: str, head_dim: int, dim: int) -> None:
    batch, _ = ragged(RAGGED[name])
    scaling = RopeScaling("linear", factor=4.0) if dim == 64 else None
    rope = RopeConfig(10_000.0, dim, scaling)
    x = array(batch.num_tokens, 3, head_dim)
    expected = ReferenceOps().rope(x, batch, rope)
    got = everywhere(lambda ops: ops.to_numpy(ops.rope(ops.from_numpy(x), ops.prepare(batch), rope)))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * 4)


def test_rope_does_not_depend_on_neighbours() -> None:
    """A token is rotated as when it is alone, also far into a sequence."""
    ops = CpuOps(threads=3)
    rope = RopeConfig(500_000.0, 64)
    batch, _ = ragged([(0, 40), (130_000, 3), (5, 1)], block_size=16)
    x = array(batch.num_tokens, 2, 64)
    whole = ops.to_numpy(ops.rope(ops.from_numpy(x), ops.prepare(batch), rope))
    for row in range(batch.num_tokens):
        alone, _ = ragged([(int(batch.positions[row]), 1)], block_size=16)
        bits_equal(
            ops.to_numpy(ops.rope(ops.from_numpy(x[row : row + 1]), ops.prepare(alone), rope)), whole[row : row + 1]
        )


# --- embedding and rows ---


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 5.656854152679443])
def test_embed(name: str, scale: float) -> None:
    """The dequantised row, times the scale in float32: bits, from every row of a panel and from the last."""
    tensor = random_tensor(name, 50, 256)
    batch, _ = ragged([(0, 60), (3, 5)])
    batch.input_ids[:50] = np.arange(50)
    expected = tensor.dequantize()[batch.input_ids] * np.float32(scale)
    got = everywhere(lambda ops: ops.to_numpy(ops.embed(ops.prepare(batch), ops.embedding_weight(tensor), scale)))
    bits_equal(got, expected)


def test_embed_nothing() -> None:
    ops = CpuOps(threads=1)
    batch, _ = ragged([])
    assert ops.to_numpy(ops.embed(ops.prepare(batch), ops.embedding_weight(random_tensor("Q4_1", 9, 64)))).shape == (
        0,
        64,
    )


def test_split_heads_and_take_rows() -> None:
    ops = CpuOps(threads=1)
    x = array(3, 96)
    parts = ops.split_heads(ops.from_numpy(x), (64, 16, 16), 16)
    values = [ops.to_numpy(part) for part in parts]
    assert [value.shape for value in values] == [(3, 4, 16), (3, 1, 16), (3, 1, 16)]
    np.testing.assert_array_equal(np.concatenate([value.reshape(3, -1) for value in values], axis=1), x)
    empty = ops.split_heads(ops.from_numpy(array(0, 96)), (64, 16, 16), 16)
    assert [ops.to_numpy(part).shape for part in empty] == [(0, 4, 16), (0, 1, 16), (0, 1, 16)]
    taken = ops.take_rows(ops.from_numpy(x), np.array([2, 0], np.int32))
    np.testing.assert_array_equal(ops.to_numpy(taken), x[[2, 0]])


# --- recorded ops ---


def step(ops: CpuOps, weights: dict[str, Any]) -> Callable[[Any], Iterator[Any]]:
    """Ops as a layer chains them: views of a buffer, residuals, buffers of equal width whose memory is used again."""

    def run(batch: Any) -> Iterator[Any]:
        x = ops.embed(batch, weights["embedding"], 2.0)
        yield x
        for layer in weights["layers"]:
            normed = ops.rms_norm(x, weights["norm"], 1e-5)
            q, k, v = ops.split_heads(ops.linear(normed, weights["qkv"]), (64, 32, 32), 16)
            q = ops.rope(ops.rms_norm(q, weights["head"], 1e-6), batch, RopeConfig(1e4, 16))
            k = ops.rope(k, batch, RopeConfig(1e4, 8))
            ops.store_kv(k, v, batch, layer)
            x = ops.linear(ops.attention(q, batch, layer, 0.25), weights["out"], x)
            up = ops.linear(ops.rms_norm(x, weights["norm"], 1e-5), weights["up"])
            x = ops.rms_norm(ops.linear(ops.gated(up, Activation.SILU), weights["down"]), weights["norm"], 1e-5, x)
            yield x

    return run


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_captured_is_eager(instruction_set: str, threads: int) -> None:
    """A recording gives the bits of the ops called one by one, for one batch after another of any size. Guards against
    memory of the arena given away while it is still read, and against what one batch leaves for the next. Rows of the
    states on the way are those of the same ops, and the last state's bits do not depend on who asks for them."""
    from octavo.ops import KVSpec

    def build() -> tuple[CpuOps, Callable[[Any], Iterator[Any]]]:
        ops = machine(instruction_set, threads)
        specs = [KVSpec(2, 16, window) for window in (None, 5, None)]
        shapes = {"embedding": ("Q6_K", 50, 256), "up": ("Q4_K", 512, 256), "down": ("Q8_0", 256, 256)}
        weights: dict[str, Any] = {name: ops.linear_weight([random_tensor(*shape)]) for name, shape in shapes.items()}
        weights["qkv"] = ops.linear_weight([random_tensor(*part) for part in QKV])
        weights["out"] = ops.linear_weight([random_tensor("F16", 256, 64)])
        weights["norm"] = ops.vector_weight(vector(256))
        weights["head"] = ops.vector_weight(vector(16))
        weights["layers"] = ops.kv_layers(specs, 80, 16)
        return ops, step(ops, weights)

    ops, function = build()
    recorded = ops.capture(function)
    eager_ops, eager = build()
    for seed, sequences in enumerate([[(0, 30)], *RAGGED.values(), [(0, 3), (16, 1)], [(0, 90), (0, 1)]]):
        batch, blocks = ragged(sequences, 16, seed=seed)
        assert blocks <= 80
        states = [eager_ops.to_numpy(state) for state in eager(eager_ops.prepare(batch))]
        handle = ops.prepare(batch)
        x, taken = recorded(handle)
        bits_equal(ops.to_numpy(x), states[-1], str(sequences))
        assert taken == {}
        random = np.random.default_rng(seed)
        most = batch.num_tokens
        wanted = {
            number: random.integers(0, most, int(random.integers(min(most, 9) + 1))).astype(np.int32)
            for number in range(len(states))
            if number != seed % len(states)
        }
        x, taken = recorded(handle, wanted)
        bits_equal(ops.to_numpy(x), states[-1], str(sequences))
        assert list(taken) == list(wanted) and len(taken) == 3
        for number, rows in wanted.items():
            bits_equal(ops.to_numpy(taken[number]), states[number][rows], f"{sequences}, state {number}")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_are_those_of_the_rows_that_are_multiplied(instruction_set: str, threads: int) -> None:
    """Whoever makes a row quantises it, where he can. Guards against codes of another row, or of another op's: of an
    input that others are multiplied before, or twice; of a part of a buffer; of heads that share a group of codes; of
    formats that need other sums."""
    from octavo.ops import KVSpec

    ops = machine(instruction_set, threads)
    table = ops.linear_weight([random_tensor("Q4_0", 50, 256)])
    norms = [ops.vector_weight(vector(256)), np.linspace(0.5, 3.0, 256, dtype=np.float32)]
    wide = ops.linear_weight([random_tensor("Q2_K", 1000, 256), random_tensor("F16", 24, 256)])
    mixed = ops.linear_weight([random_tensor(name, 32, 256) for name in ("Q4_1", "Q8_0", "Q3_K", "Q2_K")])
    last = ops.linear_weight([random_tensor("Q6_K", 96, 256)])
    of_heads = {columns: ops.linear_weight([random_tensor("Q5_0", 32, columns)]) for columns in (32, 64, 128)}
    down = ops.linear_weight([random_tensor("Q5_1", 256, 512)])
    (layer,) = ops.kv_layers([KVSpec(2, 16, None)], 80, 16)

    def run(batch: Any) -> Iterator[Any]:
        x = ops.embed(batch, table)
        one, other = (ops.rms_norm(x, norm, 1e-5) for norm in norms)
        yield ops.linear(one, mixed)
        up = ops.linear(other, wide)
        yield up
        _, part = ops.split_heads(ops.gated(up, Activation.SILU), (384, 128), 16)
        yield ops.linear(part, of_heads[128])
        qkv = ops.linear(one, last)
        yield qkv
        q, k, v = ops.split_heads(qkv, (32, 32, 32), 16)
        yield ops.linear(k, of_heads[32])
        yield ops.linear(q, of_heads[32])
        ops.store_kv(k, v, batch, layer)
        yield ops.linear(ops.attention(q, batch, layer, 0.25), of_heads[32])  # 16 columns of each head of KV
        both, _ = ops.split_heads(qkv, (64, 32), 16)
        yield ops.linear(ops.attention(both, batch, layer, 0.25), of_heads[64])  # and 32
        yield ops.linear(ops.gated(up, Activation.GELU_TANH), down, x)

    recorded = ops.capture(run)
    for seed, sequences in enumerate([[(0, 1)], [(0, 7)], [(0, 9)], *RAGGED.values(), [(3, 4), (16, 1)], [(0, 90)]]):
        batch = ops.prepare(ragged(sequences, 16, seed=seed)[0])
        expected = [ops.to_numpy(state) for state in run(batch)]
        every = np.arange(len(expected[0]), dtype=np.int32)
        x, taken = recorded(batch, dict.fromkeys(range(len(expected)), every))
        bits_equal(ops.to_numpy(x), expected[-1], str(sequences))
        for number, rows in taken.items():
            bits_equal(ops.to_numpy(rows), expected[number], f"{sequences}, state {number}")


QKV = (("Q5_K", 64, 256), ("Q5_K", 32, 256), ("Q6_K", 32, 256))


def vector(n: int) -> RawTensor:
    values = 1 + 0.2 * array(n)
    return RawTensor("n", (n,), QuantType.F32, values.astype(np.float32).view(np.uint8).reshape(1, -1))
