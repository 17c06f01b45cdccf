"""Weights in every format, batches over scattered blocks with garbage around them, and bits compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo import _C
from octavo.backends.cpu import FORMATS, CpuKV, CpuOps
from octavo.formats import QuantType, RawTensor
from octavo.ops import Batch, KVSpec, RopeConfig
from tests.backends.batches import UNUSED

Floats = NDArray[np.float32]
FLOATS = ("F32", "F16", "BF16")
CODES = tuple(name for name in FORMATS if name not in FLOATS)
INSTRUCTION_SETS = ("avx512", "avxvnni", "avx2", "portable")
ROPE = RopeConfig(10_000.0, 16)

# Byte of a block -> the float16 there: scales and minimums.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def machine(name: str, threads: int = 1, **settings: Any) -> CpuOps:
    """Ops on one instruction set; skips where the processor has not got it."""
    if name not in _C.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    return CpuOps(name, threads, **settings)


def machines(**settings: Any) -> Iterator[tuple[str, CpuOps]]:
    """Every instruction set there is, with 1 to 3 threads."""
    for name in _C.instruction_sets():
        for threads in (1, 2, 3):
            yield f"{name}, {threads} threads", CpuOps(name, threads, **settings)


def bits_equal(got: NDArray[Any], expected: NDArray[Any], note: str = "") -> None:
    """The same bits, but for NaN, which only has to be in the same places."""
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float32, note
    if got.tobytes() == expected.tobytes():
        return
    nans = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nans, err_msg=note)
    a, b = np.where(nans, np.float32(0), got), np.where(nans, np.float32(0), expected)
    different = np.ascontiguousarray(a).view(np.uint32) != np.ascontiguousarray(b).view(np.uint32)
    assert not different.any(), f"{note}: {different.sum()} of {got.size} differ, first at {np.argwhere(different)[0]}"


def array(*shape: int, seed: int = 0) -> Floats:
    return _normal(shape, seed).copy()


@functools.lru_cache(maxsize=64)
def _normal(shape: tuple[int, ...], seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- weights ---


def granularity(name: str) -> int:
    """A linear's inputs are a multiple of it."""
    return QuantType[name].block_size


def random_tensor(name: str, outputs: int, inputs: int, seed: int = 0, scales: NDArray[Any] | None = None) -> RawTensor:
    """Random codes; float16 scales of about 0.02, or drawn from `scales`. Plain values: normal."""
    random = np.random.default_rng([seed, outputs, inputs, FORMATS.index(name)])
    kind = QuantType[name]
    if name in FLOATS:
        values: NDArray[Any] = random.standard_normal((outputs, inputs)).astype(np.float32)
        if name == "F16":
            values = values.astype(np.float16)
        data: NDArray[np.uint8] = np.ascontiguousarray(values).view(np.uint8)
        if name == "BF16":
            data = np.ascontiguousarray(data.reshape(outputs, inputs, 4)[:, :, 2:]).reshape(outputs, -1)
        return RawTensor(name, (outputs, inputs), kind, data)
    blocks = random.integers(0, 256, (outputs * inputs // kind.block_size, kind.block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        if scales is None:
            halves = (random.uniform(0.01, 0.03, len(blocks)) * random.choice([-1, 1], len(blocks))).astype(np.float16)
        else:
            halves = random.choice(scales, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return RawTensor(name, (outputs, inputs), kind, blocks.reshape(outputs, -1))


def vector(values: Floats, name: str = "b") -> RawTensor:
    """A bias as a file has it."""
    return RawTensor(name, values.shape, QuantType.F32, np.ascontiguousarray(values).view(np.uint8).reshape(1, -1))


def unpacked(weight: Any, segment: int, first: int, outputs: int, inputs: int) -> Floats:
    out = np.full((outputs, inputs), np.nan, np.float32)
    weight.unpack(segment, first, out)
    return out


def run_linear(ops: CpuOps, weight: Any, x: Floats, residual: Floats | None = None) -> Floats:
    y = ops.linear(ops.from_numpy(x), weight, None if residual is None else ops.from_numpy(residual))
    return ops.to_numpy(y)


# --- KV ---


@dataclass
class Paged:
    """Sequences of known length over blocks dealt in random order, on one layer of a backend.

    `fill` is what all slots hold before; block tables are padded with ids out of range, and two blocks are nobody's.
    """

    ops: CpuOps
    lengths: Sequence[int]
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    fill: float | None = np.nan
    seed: int = 0
    tables: NDArray[np.int32] = field(init=False)
    kv: CpuKV = field(init=False)

    def __post_init__(self) -> None:
        counts = [-(-length // self.block_size) for length in self.lengths]
        num_blocks = sum(counts) + 2
        dealt = np.random.default_rng(self.seed).permutation(num_blocks).astype(np.int32)
        self.tables = np.full((len(counts), max(counts, default=0) + 1), UNUSED, np.int32)
        at = 0
        for s, count in enumerate(counts):
            self.tables[s, :count] = dealt[at : at + count]
            at += count
        spec = KVSpec(self.kv_heads, self.head_dim, self.window)
        (self.kv,) = self.ops.kv_layers([spec], num_blocks, self.block_size)
        if self.fill is not None:
            self._write_all(num_blocks * self.block_size, self.fill)

    def _write_all(self, slots: int, value: float) -> None:
        numbers = np.arange(slots, dtype=np.int32)
        table = np.arange(slots // self.block_size, dtype=np.int32)[None]
        batch = Batch(
            numbers,
            numbers,
            np.array([0, slots], np.int32),
            table,
            numbers,
            np.array([], np.int32),
            self.block_size,
        )
        values = self.ops.from_numpy(np.full((slots, self.kv_heads, self.head_dim), value, np.float32))
        self.ops.store_kv(values, values, self.ops.prepare(batch), self.kv)

    def batch(self, ranges: Sequence[tuple[int, int, int]]) -> Batch:
        """Positions [first, last) of sequence s for each (s, first, last)."""
        positions, slots = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for s, first, last in ranges:
            span = np.arange(first, last, dtype=np.int32)
            positions.append(span)
            blocks = self.tables[s, span // self.block_size]
            slots.append((blocks * self.block_size + span % self.block_size).astype(np.int32))
        starts = np.zeros(len(ranges) + 1, np.int32)
        np.cumsum([last - first for _, first, last in ranges], out=starts[1:])
        return Batch(
            input_ids=np.zeros(starts[-1], np.int32),
            positions=np.concatenate(positions),
            query_start_loc=starts,
            block_tables=self.tables[np.array([s for s, _, _ in ranges], int)],
            slot_mapping=np.concatenate(slots),
            logits_indices=np.array([], np.int32),
            block_size=self.block_size,
        )

    def store(self, ks: Sequence[Floats], vs: Sequence[Floats]) -> None:
        """All keys and values of all sequences, each [length, KH, D]."""
        batch = self.batch([(s, 0, len(k)) for s, k in enumerate(ks)])
        none = np.empty((0, self.kv_heads, self.head_dim), np.float32)
        k, v = (self.ops.from_numpy(np.concatenate([none, *values])) for values in (ks, vs))
        self.ops.store_kv(k, v, self.ops.prepare(batch), self.kv)

    def attend(self, qs: Sequence[Floats], ranges: Sequence[tuple[int, int, int]], scale: float = 0.25) -> Floats:
        """Rows of the ranges, one after the other; qs[s] are all queries of sequence s, [length, H, D]."""
        heads = qs[0].shape[1] if qs else self.kv_heads
        none = np.empty((0, heads, self.head_dim), np.float32)
        q = np.concatenate([none, *(qs[s][first:last] for s, first, last in ranges)])
        batch = self.ops.prepare(self.batch(ranges))
        return self.ops.to_numpy(self.ops.attention(self.ops.from_numpy(q), batch, self.kv, scale))


def sequences(
    lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, seed: int = 0
) -> tuple[list[Floats], list[Floats], list[Floats]]:
    """Random q [length, H, D], k and v [length, KH, D] of each sequence."""
    qs = [array(n, heads, head_dim, seed=seed + 3 * i) for i, n in enumerate(lengths)]
    ks = [array(n, kv_heads, head_dim, seed=seed + 3 * i + 1) for i, n in enumerate(lengths)]
    vs = [array(n, kv_heads, head_dim, seed=seed + 3 * i + 2) for i, n in enumerate(lengths)]
    return qs, ks, vs


K_GROUP = 32  # values of an int8 K that share a scale


def as_stored(values: Floats, kv_dtype: str, group: int) -> Floats:
    """What a KV type keeps of [length, KH, D] values; in int8, so many of them share a scale."""
    if kv_dtype == "float32":
        return values
    if kv_dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    parts = np.split(values, range(group, values.shape[-1], group), axis=-1)
    return np.concatenate([_as_codes(part) for part in parts], axis=-1)


def _as_codes(values: Floats) -> Floats:
    """What codes with one scale keep of [.., n] values."""
    top = np.abs(values).max(axis=-1, keepdims=True)
    return np.rint(values * (np.float32(127) / top)) * (top / np.float32(127))
