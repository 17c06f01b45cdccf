"""Every op of the `reference` backend against an independent definition: torch, or loops as plain as can be."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from octavo.backends.reference import KVLayer, Linear, ReferenceOps
from octavo.formats import QuantType, RawTensor
from octavo.ops import Activation, Batch, KVSpec, RopeConfig, RopeScaling
from tests.backends.batches import ragged

Floats = NDArray[Any]
ROPE = RopeConfig(10_000.0, 8)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
RAGGED: dict[str, list[tuple[int, int]]] = {
    "one row": [(0, 1)],
    "one prompt": [(0, 11)],
    "one decoding": [(13, 1)],
    "mixed": [(0, 5), (7, 1), (3, 9), (12, 4), (0, 1)],
    "with empty ranges": [(0, 0), (5, 2), (6, 0), (0, 3), (4, 0)],
    "no sequences": [],
}


@pytest.fixture(params=["float32", "float64"])
def ops(request: pytest.FixtureRequest) -> ReferenceOps:
    return ReferenceOps(request.param, request.param)


def array(ops: ReferenceOps, *shape: int, seed: int = 0) -> Floats:
    """Random and read-only: an op that writes to its inputs fails."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(ops.dtype)
    values.flags.writeable = False
    return values


def raw(values: Floats, name: str = "w") -> RawTensor:
    data = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1]).view(np.uint8)
    return RawTensor(name, values.shape, QuantType.F32, data)


def close(ops: ReferenceOps, got: Floats, expected: Any) -> None:
    assert got.dtype == ops.dtype and got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got, np.asarray(expected), rtol=0, atol=TOLERANCE[ops.dtype.name])


# --- rows ---


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 33])
def test_linear(ops: ReferenceOps, rows: int) -> None:
    """One product per row and one of the whole are different code (up to 8 rows, and above)."""
    x = array(ops, rows, 24)
    parts = [array(ReferenceOps(), outputs, 24, seed=outputs) for outputs in (16, 4, 4)]
    weight = ops.linear_weight([raw(part) for part in parts])
    assert weight.parts == (16, 4, 4)
    expected = torch.tensor(x) @ torch.tensor(np.concatenate(parts)).to(torch.tensor(x).dtype).T
    close(ops, ops.linear(x, weight), expected)
    residual = array(ops, rows, 24, seed=9)
    close(ops, ops.linear(x, weight, residual), expected + torch.tensor(residual))
    biases = [array(ReferenceOps(), outputs, seed=outputs + 1) for outputs in (16, 4, 4)]
    biased = ops.linear_weight([raw(part) for part in parts], [raw(bias) for bias in biases])
    with_bias = expected + torch.tensor(np.concatenate(biases))
    close(ops, ops.linear(x, biased), with_bias)
    close(ops, ops.linear(x, biased, residual), with_bias + torch.tensor(residual))


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (7, 1), (5, 3, 16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(ops: ReferenceOps, shape: tuple[int, ...], offset: float) -> None:
    """Also per head, [tokens, heads, head_dim], and with Gemma's offset."""
    x, stored = array(ops, *shape), array(ReferenceOps(), shape[-1], seed=1)
    weight = ops.vector_weight(raw(stored), offset)
    scale = torch.tensor((stored + np.float32(offset)).astype(ops.dtype))
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (shape[-1],), scale, eps=1e-5)
    close(ops, ops.rms_norm(x, weight, 1e-5), expected)
    residual = array(ops, *shape, seed=2)
    close(ops, ops.rms_norm(x, weight, 1e-5, residual), expected + torch.tensor(residual))


def test_rms_norm_of_zeros_is_zero(ops: ReferenceOps) -> None:
    x = np.zeros((2, 4), ops.dtype)
    np.testing.assert_array_equal(ops.rms_norm(x, np.ones(4, ops.dtype), 1e-6), x)


@pytest.mark.parametrize("scale", [1.0, 5.656854152679443])
def test_embed(ops: ReferenceOps, scale: float) -> None:
    table = array(ReferenceOps(), 50, 8)
    weight = ops.embedding_weight(raw(table))
    for name, sequences in RAGGED.items():
        batch, _ = ragged(sequences)
        expected = torch.nn.functional.embedding(torch.tensor(batch.input_ids).long(), torch.tensor(table)).double()
        got = ops.embed(batch, weight, scale)
        assert got.shape == expected.shape, name
        np.testing.assert_allclose(got, expected.numpy() * scale, rtol=1e-6)


@pytest.mark.parametrize("activation", list(Activation))
def test_gated(ops: ReferenceOps, activation: Activation) -> None:
    """Including gates so large that exp overflows: guards against NaN for inf / inf."""
    x = np.concatenate([array(ops, 6, 20), array(ops, 6, 20) * 200, array(ops, 0, 20)])
    gate, up = torch.tensor(x).chunk(2, dim=1)
    if activation is Activation.SILU:
        expected = torch.nn.functional.silu(gate) * up
    else:
        expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    got = ops.gated(x, activation)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5 if ops.dtype == np.float32 else 1e-12, atol=1e-6)


def test_split_heads(ops: ReferenceOps) -> None:
    x = array(ops, 3, 12)
    parts = ops.split_heads(x, (8, 2, 2), 2)
    assert [part.shape for part in parts] == [(3, 4, 2), (3, 1, 2), (3, 1, 2)]
    np.testing.assert_array_equal(np.concatenate([part.reshape(3, -1) for part in parts], axis=1), x)
    assert [part.shape for part in ops.split_heads(array(ops, 0, 12), (8, 2, 2), 2)] == [
        (0, 4, 2),
        (0, 1, 2),
        (0, 1, 2),
    ]


def test_take_rows(ops: ReferenceOps) -> None:
    x = array(ops, 5, 3)
    np.testing.assert_array_equal(ops.take_rows(x, np.array([4, 0], np.int32)), x[[4, 0]])
    assert ops.take_rows(x, np.array([], np.int32)).shape == (0, 3)


# --- rope ---


def rotate(x: Floats, positions: NDArray[np.int32], dim: int, frequencies: Floats) -> Floats:
    """Pairs (i, i + dim / 2) turned by position * frequency, one by one."""
    out = x.astype(np.float64)
    for t, position in enumerate(positions):
        for i in range(dim // 2):
            angle = float(np.float32(position) * frequencies[i])
            a, b = x[t, :, i].astype(np.float64), x[t, :, i + dim // 2].astype(np.float64)
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("dim", [8, 4])
@pytest.mark.parametrize("name", RAGGED)
def test_rope(ops: ReferenceOps, dim: int, name: str) -> None:
    """Guards against neighbouring pairs, wrong signs, and elements past `dim` that turn."""
    rope = RopeConfig(100.0, dim)
    batch, _ = ragged(RAGGED[name])
    x = array(ops, batch.num_tokens, 3, 8)
    frequencies = np.array([np.float32(100.0 ** (-2 * i / dim)) for i in range(dim // 2)])
    np.testing.assert_allclose(rope.inverse_frequencies(), frequencies, rtol=2e-7)
    close(ops, ops.rope(x, batch, rope), rotate(x, batch.positions, dim, rope.inverse_frequencies()))


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "linear", "factor": 8.0}, RopeScaling("linear", factor=8.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_scaled_frequencies(parameters: dict[str, Any], scaling: RopeScaling) -> None:
    """Those of transformers, for a head of Llama 3.2 1B."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=64, rope_parameters=parameters | {"rope_theta": 500_000.0}, max_position_embeddings=131_072
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    ours = RopeConfig(500_000.0, 64, scaling).inverse_frequencies()
    assert factor == 1.0 and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


# --- KV and attention ---


def layer(ops: ReferenceOps, num_blocks: int, block_size: int, window: int | None, fill: float = np.nan) -> KVLayer:
    """A layer whose slots hold garbage, as memory that was used before does."""
    (kv,) = ops.kv_layers([KVSpec(2, 8, window)], num_blocks, block_size)
    kv.k.fill(fill)
    kv.v.fill(fill)
    return kv


def naive_attention(
    q: Floats, ks: list[Floats], vs: list[Floats], batch: Batch, window: int | None, scale: float
) -> Floats:
    """One row, one head, one key at a time, in float64. ks[s]: all keys of sequence s, [seq_len, KH, D]."""
    tokens, heads, dim = q.shape
    out = np.zeros((tokens, heads, dim))
    for s in range(batch.num_seqs):
        group = heads // ks[s].shape[1]
        for t in range(batch.query_start_loc[s], batch.query_start_loc[s + 1]):
            position = int(batch.positions[t])
            first = 0 if window is None else max(position - window + 1, 0)
            for h in range(heads):
                scores = [float(q[t, h].astype(np.float64) @ ks[s][j, h // group]) for j in range(first, position + 1)]
                weights = [math.exp((score - max(scores)) * scale) for score in scores]
                for weight, j in zip(weights, range(first, position + 1), strict=True):
                    out[t, h] += weight / sum(weights) * vs[s][j, h // group].astype(np.float64)
    return out.reshape(tokens, heads * dim)


def keys_and_values(ops: ReferenceOps, batch: Batch) -> tuple[list[Floats], list[Floats]]:
    starts = batch.query_start_loc
    lengths = [int(batch.positions[stop - 1]) + 1 if stop > first else 0 for first, stop in pairwise(starts)]
    ks = [array(ops, n, 2, 8, seed=100 + s) for s, n in enumerate(lengths)]
    return ks, [array(ops, n, 2, 8, seed=200 + s) for s, n in enumerate(lengths)]


def write(ops: ReferenceOps, batch: Batch, kv: KVLayer, ks: list[Floats], vs: list[Floats]) -> None:
    """What was cached before goes straight into its slots; what is new, through the op."""
    fresh_k, fresh_v = [np.empty((0, 2, 8), ops.dtype)], [np.empty((0, 2, 8), ops.dtype)]
    for s in range(batch.num_seqs):
        new = int(batch.query_start_loc[s + 1] - batch.query_start_loc[s])
        old = len(ks[s]) - new
        for position in range(old):
            slot = batch.block_tables[s, position // batch.block_size], position % batch.block_size
            kv.k[slot], kv.v[slot] = ks[s][position], vs[s][position]
        fresh_k.append(ks[s][old:])
        fresh_v.append(vs[s][old:])
    ops.store_kv(np.concatenate(fresh_k), np.concatenate(fresh_v), batch, kv)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("window", [None, 1, 4, 5, 100])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_attention(ops: ReferenceOps, name: str, window: int | None, block_size: int) -> None:
    """Guards against wrong masks, windows off by one, heads of the wrong group, another sequence's blocks, and reading
    a slot that nobody wrote: all unused slots hold NaN, and the block tables' padding points nowhere."""
    batch, num_blocks = ragged(RAGGED[name], block_size)
    kv = layer(ops, num_blocks, block_size, window)
    ks, vs = keys_and_values(ops, batch)
    write(ops, batch, kv, ks, vs)
    q = array(ops, batch.num_tokens, 6, 8)  # three query heads to a KV head
    got = ops.attention(q, batch, kv, 0.3)
    close(ops, got, naive_attention(q, ks, vs, batch, window, 0.3))


def test_keys_behind_the_window_are_not_read(ops: ReferenceOps) -> None:
    """Once every row's window has passed a key, its slot may hold anything: its block could be given away."""
    batch, num_blocks = ragged([(9, 3)], block_size=4)
    ks, vs = keys_and_values(ops, batch)
    kv = layer(ops, num_blocks, 4, window=3)
    write(ops, batch, kv, ks, vs)
    for position in range(7):  # the first row is at 9 and sees 7, 8 and 9
        kv.k[batch.block_tables[0, position // 4], position % 4] = np.nan
        kv.v[batch.block_tables[0, position // 4], position % 4] = np.nan
    q = array(ops, 3, 6, 8)
    close(ops, ops.attention(q, batch, kv, 0.3), naive_attention(q, ks, vs, batch, 3, 0.3))


def test_large_scores(ops: ReferenceOps) -> None:
    """Guards against exp without the maximum taken off."""
    batch, num_blocks = ragged([(0, 5)])
    kv = layer(ops, num_blocks, 4, None)
    ks, vs = keys_and_values(ops, batch)
    write(ops, batch, kv, ks, vs)
    q = array(ops, 5, 6, 8)
    np.testing.assert_allclose(
        ops.attention(q, batch, kv, 1e3), naive_attention(q, ks, vs, batch, None, 1e3), atol=2e-3
    )


def test_store_kv_writes_its_slots_only(ops: ReferenceOps) -> None:
    batch, num_blocks = ragged(RAGGED["mixed"])
    kv = layer(ops, num_blocks, 4, None, fill=7.0)
    k, v = array(ops, batch.num_tokens, 2, 8), array(ops, batch.num_tokens, 2, 8, seed=1)
    ops.store_kv(k, v, batch, kv)
    flat_k, flat_v = kv.k.reshape(-1, 2, 8), kv.v.reshape(-1, 2, 8)
    np.testing.assert_array_equal(flat_k[batch.slot_mapping], k)
    np.testing.assert_array_equal(flat_v[batch.slot_mapping], v)
    others = np.setdiff1d(np.arange(len(flat_k)), batch.slot_mapping)
    assert len(others) and (flat_k[others] == 7).all() and (flat_v[others] == 7).all()


def test_kv_is_rounded_to_its_type() -> None:
    """Rows of the same step also see K and V as stored."""
    ops = ReferenceOps("float32", "float16")
    batch, num_blocks = ragged([(0, 6)])
    kv = layer(ops, num_blocks, 4, None)
    assert kv.k.dtype == np.float16
    ks, vs = keys_and_values(ops, batch)
    write(ops, batch, kv, ks, vs)
    q = array(ops, 6, 6, 8)
    rounded = [[one.astype(np.float16).astype(np.float32) for one in many] for many in (ks, vs)]
    close(ops, ops.attention(q, batch, kv, 0.3), naive_attention(q, *rounded, batch, None, 0.3))


def test_copy_blocks_in_order(ops: ReferenceOps) -> None:
    """A target may be the source of a later copy, and a source be overwritten by one. Guards against copying all at
    once, and against layers that are left out."""
    specs = [KVSpec(2, 8, None), KVSpec(1, 4, 16)]
    layers = ops.kv_layers(specs, 5, 2)
    for kv in layers:
        for block in range(5):
            kv.k[block], kv.v[block] = block, 10 + block
    ops.copy_blocks(layers, [(0, 1), (1, 2), (3, 0)])
    for kv in layers:
        assert [int(kv.k[block].max()) for block in range(5)] == [3, 0, 0, 3, 4]
        assert [int(kv.v[block].min()) for block in range(5)] == [13, 10, 10, 13, 14]


# --- memory ---


def test_bytes_are_those_that_are_taken(ops: ReferenceOps) -> None:
    """Guards against a memory plan that is made of other numbers than the arrays."""
    spec = KVSpec(3, 8, None)
    (kv,) = ops.kv_layers([spec], 7, 4)
    assert ops.kv_nbytes(spec, 28) == kv.k.nbytes + kv.v.nbytes
    tensor = raw(array(ReferenceOps(), 6, 4))
    weight = ops.linear_weight([tensor])
    assert isinstance(weight, Linear) and ops.weight_nbytes(tensor) == weight.matrix.nbytes
