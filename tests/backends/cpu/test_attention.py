"""KV and attention against the reference backend: every shape, every KV type, ragged batches, garbage all around."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.backends.cpu import KV_BYTES, CpuOps
from octavo.backends.reference import KVLayer as ReferenceLayer
from octavo.backends.reference import ReferenceOps
from octavo.ops import KVSpec
from tests.backends.cpu.harness import (
    INSTRUCTION_SETS,
    K_GROUP,
    Floats,
    Paged,
    array,
    as_stored,
    bits_equal,
    machine,
    machines,
    sequences,
)

Ranges = Sequence[tuple[int, int]]  # of each sequence: the rows computed in a step
KV_DTYPES = ("float32", "float16", "int8")

# Each sequence's (tokens cached before, tokens computed now).
RAGGED: dict[str, Ranges] = {
    "one row": [(0, 1)],
    "prompt": [(0, 75)],
    "decoding": [(0, 1), (5, 1), (63, 1), (64, 1), (65, 1), (300, 1)],
    "mixed": [(0, 5), (70, 1), (3, 90), (120, 24), (0, 1), (63, 2)],
    "with empty ranges": [(0, 0), (50, 2), (60, 0), (0, 30), (4, 0)],
    "no sequences": [],
    "long": [(333, 1), (250, 70)],
}

# (query heads to a KV head, KV heads, head_dim, block_size, window): every value of each beside several of the others
SHAPES = [
    (1, 1, 16, 16, None),
    (2, 2, 64, 32, None),
    (3, 3, 96, 64, 40),
    (4, 8, 16, 16, 64),
    (5, 1, 128, 32, 1),
    (6, 2, 256, 16, 65),
    (7, 3, 64, 64, None),
    (8, 1, 96, 16, 100),
    (3, 8, 64, 32, 17),
    (1, 2, 128, 64, 3),
    (4, 1, 256, 64, None),
    (8, 3, 16, 32, 500),
    (20, 2, 32, 16, 33),
]


def reference(paged: Paged, qs: list[Floats], ks: list[Floats], vs: list[Floats], ranges: Ranges) -> Floats:
    """The same rows on the reference backend in float64, from keys and values as the KV type stores them."""
    ops = ReferenceOps("float64", "float64")
    num_blocks = int(sum(-(-length // paged.block_size) for length in paged.lengths)) + 2
    shape = (num_blocks, paged.block_size, paged.kv_heads, paged.head_dim)
    layer = ReferenceLayer(np.full(shape, np.nan), np.full(shape, np.nan), paged.window)
    everything = paged.batch([(s, 0, len(k)) for s, k in enumerate(ks)])
    none = np.empty((0, *shape[2:]), np.float32)
    k = np.concatenate([none, *(as_stored(a, paged.ops.kv_dtype, K_GROUP) for a in ks)])
    v = np.concatenate([none, *(as_stored(a, paged.ops.kv_dtype, paged.head_dim) for a in vs)])
    ops.store_kv(k, v, everything, layer)
    steps = [(s, old, old + new) for s, (old, new) in enumerate(ranges)]
    heads = qs[0].shape[1] if qs else paged.kv_heads
    none = np.empty((0, heads, paged.head_dim), np.float32)
    q = np.concatenate([none, *(qs[s][first:last] for s, first, last in steps)]).astype(np.float64)
    return ops.attention(q, paged.batch(steps), layer, 0.25)


def codes_of(values: Floats, group: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """int8 codes of [..., D] values and the scale of each, one for a group of them, in float32 as kernels compute."""
    codes, scales = [], []
    for part in np.split(values, range(group, values.shape[-1], group), axis=-1):
        top = np.abs(part).max(axis=-1, keepdims=True)
        codes.append(np.rint(part * (np.float32(127) / top)))
        scales.append(np.broadcast_to(top / np.float32(127), part.shape))
    return np.concatenate(codes, axis=-1).astype(float), np.concatenate(scales, axis=-1).astype(float)


def integers(qs: list[Floats], ks: list[Floats], vs: list[Floats], ranges: Ranges, window: int | None) -> Floats:
    """The same rows as the integer kernels define them, but for rounding of floats: queries in codes too, and the
    weights of each 64 keys, with the scales of V, in 255 steps of the greatest."""
    rows = []
    for q, k, v, (old, new) in zip(qs, ks, vs, ranges, strict=True):
        (kv_heads, dim), group = k.shape[1:], q.shape[1] // k.shape[1]
        positions = np.arange(old, old + new)
        found = np.zeros((new, kv_heads, group, dim))
        for head in range(kv_heads):
            q_codes, q_scales = codes_of(q[old : old + new, head * group : (head + 1) * group], K_GROUP)
            (k_codes, k_scales), (v_codes, v_scales) = codes_of(k[:, head], K_GROUP), codes_of(v[:, head], dim)
            top, total, out = np.full((new, group, 1), -np.inf), np.zeros((new, group, 1)), found[:, head]
            for first in range(0, len(k), 64):
                keys = np.arange(first, min(first + 64, len(k)))
                sees = (keys <= positions[:, None]) & (keys > positions[:, None] - (window or len(k)))
                scores = np.zeros((new, group, len(keys)))
                for d in range(0, dim, K_GROUP):
                    sums = np.einsum("rhd,kd->rhk", q_codes[..., d : d + K_GROUP], k_codes[keys, d : d + K_GROUP])
                    scores += sums * q_scales[..., d : d + 1] * k_scales[keys, d]
                scores = np.where(sees[:, None], scores * 0.25, -np.inf)
                here = np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
                weights = np.exp(scores - here)
                taken = weights * v_scales[keys, 0]
                step = np.maximum(taken.max(axis=-1, keepdims=True), 1e-30) / 255
                mixed = np.rint(taken / step) @ v_codes[keys] * step
                best = np.maximum(top, here)
                total = total * np.exp(top - best) + weights.sum(axis=-1, keepdims=True) * np.exp(here - best)
                out[:] = out * np.exp(top - best) + mixed * np.exp(here - best)
                top = best
            out /= total
        rows.append(found.reshape(new, kv_heads * group * dim))
    return np.concatenate(rows) if rows else np.empty((0, 0))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_attention(kv_dtype: str, shape: tuple[int, int, int, int, int | None], name: str) -> None:
    """Guards against wrong masks, windows off by one, heads of the wrong group, another sequence's blocks, and slots
    that nobody wrote: all of them hold NaN. The instruction sets take turns; that they agree is shown elsewhere."""
    group, kv_heads, head_dim, block_size, window = shape
    names = [isa for isa, _ in machines()][::3]
    turn = SHAPES.index(shape) + KV_DTYPES.index(kv_dtype) + list(RAGGED).index(name)
    ops = machine(names[turn % len(names)].split(",")[0], threads=1 + turn % 2, kv_dtype=kv_dtype)
    ranges = RAGGED[name]
    lengths = [old + new for old, new in ranges]
    qs, ks, vs = sequences(lengths, group * kv_heads, kv_heads, head_dim)
    paged = Paged(ops, lengths, kv_heads, head_dim, block_size, window)
    paged.store(ks, vs)
    got = paged.attend(qs, [(s, old, old + new) for s, (old, new) in enumerate(ranges)])
    expected = reference(paged, qs, ks, vs, ranges)
    assert got.shape == expected.shape and len(got) == sum(new for _, new in ranges)
    if kv_dtype == "int8" and len(got):
        # Queries and weights are codes besides: a per cent of what is mixed. And what the kernels define, but that
        # some weights fall on another step for float32's rounding.
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.2)
        assert np.sqrt(np.mean((got - expected) ** 2)) < 0.015
        defined = integers(qs, ks, vs, ranges, window)
        assert (np.abs(got - defined) < 2e-5).mean() > 0.98
        np.testing.assert_allclose(got, defined, rtol=0, atol=0.01)
        return
    # Scores go up to 20 here, and each is a float32 sum of head_dim products.
    np.testing.assert_allclose(got, expected, rtol=0, atol=max(1e-5, 1e-7 * head_dim))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("rows", [1, 9])
def test_garbage_is_never_read(instruction_set: str, kv_dtype: str, window: int | None, rows: int) -> None:
    """What lies in slots that a row may not see changes no bit: unwritten ones in the same block, future tokens, keys
    behind the window, other sequences. Guards against 0 * NaN."""
    ops = machine(instruction_set, threads=2, kv_dtype=kv_dtype)
    lengths, first = [301, 40], 301 - rows
    qs, ks, vs = sequences(lengths, 6, 2, 64)
    results = []
    for fill in (None, np.nan, np.inf, -3e38):
        with np.errstate(all="ignore"):
            paged = Paged(ops, [length + 3 for length in lengths], 2, 64, 16, window, fill=fill)
            paged.store(ks, vs)
            hidden = 0 if window is None or fill is None else first - window + 1
            if hidden:  # no row of this step sees these any more
                ks2, vs2 = ([np.array(many) for many in both] for both in (ks, vs))
                ks2[0][:hidden] = vs2[0][:hidden] = fill
                ks2[1][:] = vs2[1][:] = fill
                paged.store(ks2, vs2)
        results.append(paged.attend(qs, [(0, first, 301)]))
    assert np.isfinite(results[0]).all()
    for got in results[1:]:
        bits_equal(got, results[0])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_damage_shows(kv_dtype: str, where: str) -> None:
    """NaN in a query, or in a key or value that a row sees, reaches the row, and no row that does not see it. Guards
    against NaN that a maximum or an int8 code drops."""
    for note, ops in machines(kv_dtype=kv_dtype):
        qs, ks, vs = sequences([150], 4, 2, 32)
        {"q": qs, "k": ks, "v": vs}[where][0][100, 1, 7] = np.nan
        paged = Paged(ops, [150], 2, 32)
        paged.store(ks, vs)
        bad = np.isnan(paged.attend(qs, [(0, 0, 150)]).reshape(150, 4, 32))
        expected = np.zeros((150, 4), bool)
        if where == "q":
            expected[100, 1] = True
        else:
            expected[100:, 2:] = True  # the second KV head's queries
        np.testing.assert_array_equal(bad.any(axis=2), expected, err_msg=note)
        if where != "v" or kv_dtype == "int8":
            np.testing.assert_array_equal(bad.all(axis=2), expected, err_msg=note)


def test_large_scores() -> None:
    """Guards against exp without the maximum taken off, within a tile and between tiles."""
    qs, ks, vs = sequences([200], 2, 1, 16)
    for note, ops in machines(kv_dtype="float32"):
        paged = Paged(ops, [200], 1, 16)
        paged.store(ks, vs)
        got = paged.attend(qs, [(0, 0, 200)], 1e3)
        scores = np.einsum("qhd,kd->hqk", qs[0].astype(np.float64), ks[0][:, 0]) * 1e3
        scores[:, np.triu(np.ones((200, 200), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        exact = np.einsum("hqk,kd->qhd", weights, vs[0][:, 0].astype(np.float64)).reshape(200, -1)
        np.testing.assert_allclose(got, exact, atol=3e-3, err_msg=note)
        assert np.median(np.abs(got - exact)) < 1e-6


# --- stored K and V ---


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_stored_values(instruction_set: str, kv_dtype: str, block_size: int) -> None:
    """A row that sees one key only gives that key's value as stored: float16 rounded to nearest, int8 by the greatest
    of its values. From zero and denormals to values beyond float16, which become infinite."""
    ops = machine(instruction_set, kv_dtype=kv_dtype)
    head_dim = 80
    k = array(70, 2, head_dim)
    v = array(70, 2, head_dim, seed=1) * np.exp2(np.arange(70, dtype=np.float32) / 2 - 28)[:, None, None]
    v[3] = 0
    if kv_dtype != "int8":
        v[4], v[5, :, ::2], v[6] = 1e6, -65519.99, 65520.0
    paged = Paged(ops, [70], 2, head_dim, block_size, window=1)
    paged.store([k], [v])
    got = paged.attend([array(70, 4, head_dim)], [(0, 0, 70)])
    with np.errstate(all="ignore"):
        stored = np.nan_to_num(as_stored(v, kv_dtype, head_dim), posinf=np.inf, neginf=-np.inf)
    stored = np.repeat(stored, 2, axis=1).reshape(70, -1)
    if kv_dtype == "int8":  # the one weight is 255 steps of 1/255
        np.testing.assert_allclose(got, stored, rtol=3e-7, atol=0)
    else:
        bits_equal(got + np.float32(0), stored + np.float32(0))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_copy_blocks_in_order(kv_dtype: str) -> None:
    """A target may be the source of a later copy, and a source be overwritten by one; all layers. Whole blocks move:
    guards against scales left behind."""
    ops = CpuOps(threads=1, kv_dtype=kv_dtype)
    specs = [KVSpec(2, 32, None), KVSpec(1, 16, 16)]
    layers = ops.kv_layers(specs, 5, 16)
    values = [array(5 * 16, spec.num_kv_heads, spec.head_dim, seed=i) for i, spec in enumerate(specs)]

    def read(index: int) -> Floats:
        """Values of all slots, read block by block as sequences of their own."""
        spec, kv = specs[index], layers[index]
        paged = Paged(ops, [16] * 5, spec.num_kv_heads, spec.head_dim, fill=None)
        paged.tables[:, 0] = np.arange(5)
        one_key = ops.kv_layers([KVSpec(spec.num_kv_heads, spec.head_dim, 1)], 0, 16)[0]
        assert one_key.layer is not kv.layer
        paged.kv = kv
        q = np.zeros((16, spec.num_kv_heads, spec.head_dim), np.float32)
        out = paged.attend([q] * 5, [(s, 0, 16) for s in range(5)])  # zero queries: means of values
        return out.reshape(5, 16, -1)

    for index, kv in enumerate(layers):
        paged = Paged(ops, [16] * 5, specs[index].num_kv_heads, specs[index].head_dim, fill=None)
        paged.tables[:, 0] = np.arange(5)
        paged.kv = kv
        parts = np.split(values[index], 5)
        paged.store(parts, parts)
    before = [read(0), read(1)]
    ops.copy_blocks(layers, [(0, 1), (1, 2), (3, 0)])
    for index in range(2):
        after = read(index)
        for block, source in enumerate([3, 0, 0, 3, 4]):
            bits_equal(after[block], before[index][source], f"layer {index}, block {block}")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bytes_of_kv(kv_dtype: str) -> None:
    """The memory plan's number is what a block of a layer takes."""
    ops = CpuOps(threads=1, kv_dtype=kv_dtype)
    spec = KVSpec(3, 64, None)
    values = 2 * 160 * 3 * 64 * KV_BYTES[kv_dtype]
    scales = 160 * 3 * 4 * (2 + 1) if kv_dtype == "int8" else 0  # of K one for 32 values, of V one
    assert ops.kv_nbytes(spec, 160) == values + scales
    assert ops.kv_layers([spec], 10, 16)[0].layer.nbytes == ops.kv_nbytes(spec, 160)
