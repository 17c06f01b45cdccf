"""Rows that share blocks read them together, and rows of draft trees see their ancestors: to the same bits as rows of
plain sequences computed one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from octavo.backends.cpu import CpuOps
from octavo.backends.reference import ReferenceOps
from octavo.ops import Batch
from tests.backends.cpu.harness import INSTRUCTION_SETS, Floats, Paged, bits_equal, machine, sequences

KV_DTYPES = ("float16", "float32", "int8")
# (query heads to a KV head, KV heads, head_dim, window)
SHAPES = [(3, 3, 64, None), (4, 1, 256, 100), (1, 2, 16, 70), (8, 1, 96, None), (2, 8, 128, 17)]
# A tree of prefixes: length of each sequence, and which earlier one it shares how many tokens with.
Family = list[tuple[int, tuple[int, int] | None]]
FAMILY: Family = [
    (390, None),
    (391, (0, 320)),
    (333, (0, 320)),
    (400, (2, 328)),
    (200, (0, 128)),
    (500, None),
    (70, (0, 64)),
]
# Many that share all but their last tokens.
BURST: Family = [(280, None), *((260 + 7 * n, (0, 256)) for n in range(1, 20))]
Shape = tuple[int, int, int, int | None]


def family(ops: CpuOps, shape: Shape, block_size: int, of: Family = FAMILY) -> tuple[Paged, list[Floats]]:
    """Sequences whose tables begin with the same blocks, as forks and cached prefixes have them."""
    group, kv_heads, head_dim, window = shape
    lengths = [length for length, _ in of]
    qs, ks, vs = sequences(lengths, group * kv_heads, kv_heads, head_dim)
    paged = Paged(ops, lengths, kv_heads, head_dim, block_size, window)
    for s, (_, shares) in enumerate(of):
        if shares is None:
            continue
        whose, tokens = shares[0], shares[1] // block_size * block_size
        paged.tables[s, : tokens // block_size] = paged.tables[whose, : tokens // block_size]
        ks[s][:tokens], vs[s][:tokens] = ks[whose][:tokens], vs[whose][:tokens]
    paged.store(ks, vs)
    return paged, qs


def last_rows(counts: list[int]) -> list[tuple[int, int, int]]:
    return [(s, FAMILY[s][0] - count, FAMILY[s][0]) for s, count in enumerate(counts) if count]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_shared_prefixes(instruction_set: str, kv_dtype: str, shape: Shape, block_size: int) -> None:
    """Decoding, drafts and prompts over a tree of prefixes: each row as alone, with any number of threads."""
    alone = machine(instruction_set, 1, kv_dtype=kv_dtype, share_prefixes=False)
    paged, qs = family(alone, shape, block_size)
    batches = [last_rows(counts) for counts in ([1] * 7, [1, 3, 1, 2, 8, 1, 1], [1, 0, 20, 1, 0, 1, 0])]
    rows = sorted({(s, row) for ranges in batches for s, start, stop in ranges for row in range(start, stop)})
    expected = {(s, row): paged.attend(qs, [(s, row, row + 1)]) for s, row in rows}
    for threads in (1, 3):
        together = machine(instruction_set, threads, kv_dtype=kv_dtype)
        paged_together, _ = family(together, shape, block_size)
        for ranges in batches:
            got = paged_together.attend(qs, ranges)
            wanted = [expected[s, row] for s, start, stop in ranges for row in range(start, stop)]
            bits_equal(got, np.concatenate(wanted), f"{threads} threads, rows {ranges}")
        # A window of 17 or 70 tokens hides what these share.
        assert together.machine.shared_tiles > 0 or shape[3] in (17, 70)
    assert alone.machine.shared_tiles == 0


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (2, 4, 32, 300)], ids=str)
def test_a_prefix_of_many(instruction_set: str, kv_dtype: str, shape: Shape) -> None:
    """Rows that read their first tiles together fold them as they go, where that is work enough for each thread: the
    bits are those of tiles that are states, and of rows alone. Some rows end inside of what is shared."""
    alone = machine(instruction_set, 1, kv_dtype=kv_dtype, share_prefixes=False)
    paged, qs = family(alone, shape, 16, BURST)
    ends = [(s, len(q) - 1, len(q)) for s, q in enumerate(qs)]
    batches = [
        ends,
        ends[:5],
        [*ends[:8], (8, 254, 262), (9, 250, 257)],  # their first rows see less than all that is shared
        [(0, 120, 124), *ends[1:4], (4, 190, 194), (5, 66, 68)],
        [(s, first - s % 4, stop) for s, first, stop in ends],
    ]
    rows = sorted({(s, row) for ranges in batches for s, start, stop in ranges for row in range(start, stop)})
    expected = {(s, row): paged.attend(qs, [(s, row, row + 1)]) for s, row in rows}
    for threads in (1, 2, 5):
        together = machine(instruction_set, threads, kv_dtype=kv_dtype)
        paged_together, _ = family(together, shape, 16, BURST)
        for ranges in batches:
            for state_bytes in (1 << 24, 30_000):  # with few, some rows read all by themselves
                together.machine.state_bytes = state_bytes
                got = paged_together.attend(qs, ranges)
                wanted = [expected[s, row] for s, start, stop in ranges for row in range(start, stop)]
                bits_equal(got, np.concatenate(wanted), f"{threads} threads, {state_bytes} bytes, rows {ranges}")
        assert together.machine.shared_tiles > 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_shared_tile_is_read_once(kv_dtype: str) -> None:
    """Levels of the tree: 64 tokens of six sequences, 128 of five, then 192 more of four, and the last 64 of nobody."""
    ops = CpuOps(threads=2, kv_dtype=kv_dtype)
    paged, qs = family(ops, SHAPES[0], 16)
    paged.attend(qs, last_rows([1] * 7))
    assert ops.machine.shared_tiles == 3 * (320 // 64)
    paged.attend(qs, last_rows([1, 0, 0, 0, 0, 1, 0]))
    assert ops.machine.shared_tiles == 3 * (320 // 64), "nothing in common, nothing shared"


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("state_bytes", [0, 3000, 20_000, 40_000, 1 << 20])
def test_states_take_no_more_than_they_may(state_bytes: int, kv_dtype: str) -> None:
    """Rows that would need more read their tiles by themselves, to the same bits."""
    alone = CpuOps(threads=1, share_prefixes=False, kv_dtype=kv_dtype)
    ops = CpuOps(threads=2, kv_dtype=kv_dtype)
    ops.machine.state_bytes = state_bytes
    expecting, qs = family(alone, SHAPES[0], 16)
    paged, _ = family(ops, SHAPES[0], 16)
    for counts in ([1] * 7, [1, 3, 1, 2, 8, 1, 1]):
        bits_equal(paged.attend(qs, last_rows(counts)), expecting.attend(qs, last_rows(counts)), str(counts))
    shared = ops.machine.shared_tiles
    assert (shared == 0) if state_bytes < 30_000 else (shared > 0)


# --- draft trees ---

PREFIX = 150
PARENTS = [-1, -1, 0, 0, 2, 1, 4]  # nodes in order; two roots


def depth(node: int) -> int:
    return 0 if PARENTS[node] < 0 else depth(PARENTS[node]) + 1


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_one_handle_for_many_layers(kv_dtype: str) -> None:
    """A prepared batch serves layers of several windows and machines of several settings, and stays as it was when its
    arrays change. Guards against a cut that was made for another layer or another number of threads."""
    alone = CpuOps(threads=1, share_prefixes=False, kv_dtype=kv_dtype)
    together = CpuOps(threads=3, kv_dtype=kv_dtype)
    for window in (None, 40):
        paged, qs = family(alone, (2, 2, 16, window), 16)
        layers = {ops: family(ops, (2, 2, 16, window), 16)[0].kv for ops in (alone, together)}
        ranges = last_rows([1] * 7)
        batch = paged.batch(ranges)
        if window is None:
            handle = alone.prepare(batch)
        batch.positions[...] = 0
        q = np.concatenate([qs[s][first:last] for s, first, last in ranges])
        expected = paged.attend(qs, ranges)
        for ops, layer in layers.items():
            before = ops.machine.shared_tiles
            for _ in range(2):
                got = ops.to_numpy(ops.attention(ops.from_numpy(q), handle, layer, 0.25))
                bits_equal(got, expected, f"window {window}")
            assert (ops.machine.shared_tiles > before) == (ops is together)


def path(node: int) -> list[int]:
    return [*([] if PARENTS[node] < 0 else path(PARENTS[node])), node]


def tree_batch(paged: Paged, nodes: list[int], before: int = 0) -> Batch:
    """The last `before` tokens of the prefix as ordinary rows, then the nodes, which lie behind the prefix."""
    positions = [*range(PREFIX - before, PREFIX), *(PREFIX + depth(node) for node in nodes)]
    logical = [*range(PREFIX - before, PREFIX), *(PREFIX + node for node in nodes)]
    parents = [-1] * before + [before + nodes.index(PARENTS[n]) if PARENTS[n] >= 0 else -1 for n in nodes]
    base = paged.batch([(0, 0, len(logical))])
    size = paged.block_size
    slots = [int(paged.tables[0, at // size]) * size + at % size for at in logical]
    return replace(
        base,
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int32),
        tree_starts=np.array([PREFIX], np.int32),
        tree_parents=np.array(parents, np.int32),
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draft_tree(instruction_set: str, kv_dtype: str, shape: Shape) -> None:
    """Each node as the last token of a plain sequence of its ancestors; nodes that are no ancestors hold NaN."""
    group, kv_heads, head_dim, window = shape
    (q,), (k,), (v,) = sequences([PREFIX + len(PARENTS)], group * kv_heads, kv_heads, head_dim)
    nodes = list(range(len(PARENTS)))
    for threads in (1, 2):
        ops = machine(instruction_set, threads, kv_dtype=kv_dtype)
        paged = Paged(ops, [PREFIX + len(PARENTS)], kv_heads, head_dim, 16, window)
        paged.store([k], [v])
        got = attend(ops, paged, q[PREFIX - 2 :], tree_batch(paged, nodes, before=2), "cpu")
        for node in nodes:
            plain = Paged(ops, [PREFIX + depth(node) + 1], kv_heads, head_dim, 16, window, seed=node)
            rows = [*range(PREFIX), *(PREFIX + n for n in path(node))]
            plain.store([k[rows]], [v[rows]])
            expected = plain.attend([q[rows]], [(0, len(rows) - 1, len(rows))])
            bits_equal(got[2 + node][None], expected, f"node {node}, {threads} threads")
        ordinary = paged.attend([q], [(0, PREFIX - 2, PREFIX)])
        bits_equal(got[:2], ordinary, "rows before the tree")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (2, 4, 32, 140)], ids=str)
def test_a_tree_behind_a_shared_prefix(kv_dtype: str, shape: Shape) -> None:
    """Nodes, and another sequence's last row, as they are by themselves."""
    group, kv_heads, head_dim, window = shape
    lengths = [PREFIX + len(PARENTS), PREFIX + 20]
    qs, ks, vs = sequences(lengths, group * kv_heads, kv_heads, head_dim)
    ks[1][:128], vs[1][:128] = ks[0][:128], vs[0][:128]

    def paged_on(ops: CpuOps) -> Paged:
        paged = Paged(ops, lengths, kv_heads, head_dim, 16, window)
        paged.tables[1, : 128 // 16] = paged.tables[0, : 128 // 16]
        paged.store(ks, vs)
        return paged

    alone = machine("avx2" if "avx2" in INSTRUCTION_SETS else "portable", 1, kv_dtype=kv_dtype, share_prefixes=False)
    nodes = list(range(len(PARENTS)))
    paged = paged_on(alone)
    row = (1, lengths[1] - 1, lengths[1])
    expected = [attend(alone, paged, qs[0][PREFIX:], tree_batch(paged, nodes), "cpu"), paged.attend(qs, [row])]
    for threads in (1, 2, 3):
        ops = CpuOps(threads=threads, kv_dtype=kv_dtype)
        paged = paged_on(ops)
        batch = replace(
            paged.batch([(0, PREFIX, lengths[0]), row]),
            tree_starts=np.array([PREFIX, -1], np.int32),
            tree_parents=np.array([*PARENTS, -1], np.int32),
        )
        batch.positions[: len(nodes)] = [PREFIX + depth(node) for node in nodes]
        got = attend(ops, paged, np.concatenate([qs[0][PREFIX:], qs[1][-1:]]), batch, "cpu")
        bits_equal(got, np.concatenate(expected), f"{threads} threads")
        assert ops.machine.shared_tiles > 0


def attend(ops: CpuOps | ReferenceOps, paged: Paged, q: Floats, batch: Batch, name: str) -> Floats:
    if isinstance(ops, CpuOps):
        return ops.to_numpy(ops.attention(ops.from_numpy(q), ops.prepare(batch), paged.kv, 0.25))
    return ops.attention(q, batch, paged.kv, 0.25)  # type: ignore[arg-type] # a layer of its own kind


@pytest.mark.parametrize("window", [None, 40])
def test_draft_tree_against_the_reference(window: int | None) -> None:
    (q,), (k,), (v,) = sequences([PREFIX + len(PARENTS)], 6, 2, 32)
    results = []
    for ops in (CpuOps(threads=1, kv_dtype="float32"), ReferenceOps()):
        paged = Paged(ops, [PREFIX + len(PARENTS)], 2, 32, 16, window, fill=None)  # type: ignore[arg-type]
        batch = paged.batch([(0, 0, len(k))])
        if isinstance(ops, CpuOps):
            paged.store([k], [v])
        else:
            ops.store_kv(k, v, batch, paged.kv)  # type: ignore[arg-type]
        results.append(attend(ops, paged, q[PREFIX:], tree_batch(paged, list(range(len(PARENTS)))), "both"))
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_trees_that_do_not_fit() -> None:
    ops = CpuOps(threads=1)
    paged = Paged(ops, [PREFIX + len(PARENTS)])
    good = tree_batch(paged, list(range(len(PARENTS))))
    q = np.zeros((len(PARENTS), 2, 16), np.float32)
    assert good.tree_parents is not None
    for node, parent in ((0, 0), (2, 5), (3, -1), (6, 100), (4, 0)):
        parents = good.tree_parents.copy()
        parents[node] = parent
        with pytest.raises(ValueError, match="draft tree"):
            attend(ops, paged, q, replace(good, tree_parents=parents), "cpu")
    with pytest.raises(ValueError, match="together"):
        attend(ops, paged, q, replace(good, tree_parents=None), "cpu")
