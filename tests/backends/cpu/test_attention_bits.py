"""A row's attention is the same bits however it is computed: alone, in chunks, beside others, in other blocks, on any
number of threads, with any instruction set."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from octavo.backends.cpu import CpuOps
from tests.backends.cpu.harness import INSTRUCTION_SETS, Floats, Paged, bits_equal, machine, sequences

LENGTH = 390  # six whole tiles and a part: more than one thread's share of a decoding row
CHUNKS = (1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100, 128, LENGTH)

# (query heads to a KV head, KV heads, head_dim, window)
SHAPES = [(3, 3, 64, None), (4, 1, 256, 100), (1, 2, 16, 70), (8, 1, 96, None), (2, 8, 128, 17)]
KV_DTYPES = ("float16", "float32", "int8")


def layer(ops: CpuOps, shape: tuple[int, int, int, int | None], block_size: int = 16, others: bool = False) -> Paged:
    """One sequence of LENGTH, alone or the second of four."""
    _, kv_heads, head_dim, window = shape
    lengths = [33, LENGTH, 260, 1] if others else [LENGTH]
    paged = Paged(ops, lengths, kv_heads, head_dim, block_size, window, seed=block_size + others)
    _, ks, vs = inputs(shape)
    order = [1, 0, 2, 3] if others else [0]
    paged.store([ks[i] for i in order], [vs[i] for i in order])
    return paged


@cache
def inputs(shape: tuple[int, int, int, int | None]) -> tuple[list[Floats], list[Floats], list[Floats]]:
    group, kv_heads, head_dim, _ = shape
    return sequences([LENGTH, 33, 260, 1], group * kv_heads, kv_heads, head_dim)


@cache
def expected(shape: tuple[int, int, int, int | None], kv_dtype: str) -> Floats:
    """Row by row, as decoding on one thread of the first instruction set."""
    paged = layer(CpuOps(threads=1, kv_dtype=kv_dtype), shape)
    qs = inputs(shape)[0][:1]
    return np.concatenate([paged.attend(qs, [(0, row, row + 1)]) for row in range(LENGTH)])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_any_chunk(kv_dtype: str, shape: tuple[int, int, int, int | None], block_size: int) -> None:
    """Guards against sums that depend on which rows share a tile, and on where blocks end."""
    paged = layer(CpuOps(threads=1, kv_dtype=kv_dtype), shape, block_size)
    qs = inputs(shape)[0][:1]
    for chunk in CHUNKS[block_size // 16 :: 2]:
        for offset in {0, chunk // 2}:
            edges = [0, *range(chunk - offset, LENGTH, chunk), LENGTH]
            rows = [paged.attend(qs, [(0, a, b)]) for a, b in pairwise(edges)]
            bits_equal(np.concatenate(rows), expected(shape, kv_dtype), f"chunks of {chunk} after {offset}")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_instruction_sets_and_threads(
    instruction_set: str, kv_dtype: str, shape: tuple[int, int, int, int | None], threads: int
) -> None:
    """Alone, with several threads, a decoding row's tiles are split among them; in a prompt they are not."""
    paged = layer(machine(instruction_set, threads, kv_dtype=kv_dtype), shape)
    qs = inputs(shape)[0][:1]
    bits_equal(paged.attend(qs, [(0, 0, LENGTH)]), expected(shape, kv_dtype), "whole")
    for row in (0, 15, 16, 63, 64, 65, 255, 256, 319, 320, 388, LENGTH - 1):
        bits_equal(paged.attend(qs, [(0, row, row + 1)]), expected(shape, kv_dtype)[row : row + 1], f"row {row}")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_among_other_sequences(threads: int, kv_dtype: str, shape: tuple[int, int, int, int | None]) -> None:
    """Decoding beside prompts and other rows that decode, in every place of the batch."""
    qs = inputs(shape)[0]
    qs = [qs[1], qs[0], qs[2], qs[3]]
    paged = layer(CpuOps(threads=threads, kv_dtype=kv_dtype), shape, 32, others=True)
    for a, b in ((LENGTH - 1, LENGTH), (300, 309), (256, 257), (0, LENGTH)):
        others = [(0, 0, 33), (2, 259, 260), (3, 0, 1)]
        for place in range(4):
            ranges = [*others[:place], (1, a, b), *others[place:]]
            at = sum(last - first for _, first, last in others[:place])
            bits_equal(paged.attend(qs, ranges)[at : at + b - a], expected(shape, kv_dtype)[a:b], f"{place}: {a}")


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_few_rows_are_split_and_many_are_not(threads: int, kv_dtype: str) -> None:
    """The same decoding row among so many that each has a thread of its own."""
    shape = SHAPES[0]
    _, kv_heads, head_dim, _ = shape
    count = 8 * threads
    qs, ks, vs = (values[:1] * count for values in inputs(shape))
    paged = Paged(CpuOps(threads=threads, kv_dtype=kv_dtype), [LENGTH] * count, kv_heads, head_dim)
    paged.store(ks, vs)
    got = paged.attend(qs, [(s, LENGTH - 1, LENGTH) for s in range(count)])
    for row in got:
        bits_equal(row[None], expected(shape, kv_dtype)[-1:])


def test_written_in_the_same_step() -> None:
    """Rows of a step read what the step itself stored, rounded, as later rows will: chunk by chunk is all at once."""
    shape = SHAPES[0]
    _, kv_heads, head_dim, _ = shape
    qs, ks, vs = (values[:1] for values in inputs(shape))
    for kv_dtype in KV_DTYPES:
        ops = CpuOps(threads=2, kv_dtype=kv_dtype)
        paged = Paged(ops, [LENGTH], kv_heads, head_dim, 64)
        rows = []
        for first in range(0, LENGTH, 37):
            last = min(first + 37, LENGTH)
            k, v = (ops.from_numpy(values[0][first:last]) for values in (ks, vs))
            ops.store_kv(k, v, ops.prepare(paged.batch([(0, first, last)])), paged.kv)
            rows.append(paged.attend(qs, [(0, first, last)]))
        bits_equal(np.concatenate(rows), expected(shape, kv_dtype))
