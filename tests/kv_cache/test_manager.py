"""The pool and the manager: sharing, copy on write, and the conservation law."""

from __future__ import annotations

import random

import pytest

from octavo.core.plan import BlockCopy
from octavo.kv_cache import BlockPool, BlockTable, KVCacheManager


def test_pool_refuses_what_would_lose_a_block() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="free already"):
        pool.release(block)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(block)
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


def test_allocate_grows_by_blocks_and_is_all_or_nothing() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=4)
    table = kv.new_table()
    assert kv.allocate(table, 0, 5) == ()
    assert len(table) == 2
    assert kv.allocate(table, 5, 8) == ()
    assert len(table) == 2
    before = list(table)
    assert kv.allocate(table, 8, 17) is None
    assert table == before and kv.num_available == 2
    kv.free(table)
    assert kv.num_available == 4


def test_copy_on_write_copies_only_the_shared_tail_and_only_once() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    parent = kv.new_table()
    kv.allocate(parent, 0, 6)
    child = kv.fork(parent, 6)
    assert child == parent
    tail = parent[1]
    copies = kv.allocate(child, 6, 7)
    assert copies == (BlockCopy(tail, child[1]),) and child[1] != tail and child[0] == parent[0]
    assert kv.allocate(parent, 6, 7) == ()  # the parent owns its tail alone again
    kv.check([parent, child])
    assert kv.num_copies == 1


def test_a_fork_on_a_block_edge_copies_nothing() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    parent = kv.new_table()
    kv.allocate(parent, 0, 8)
    child = kv.fork(parent, 8)
    assert kv.allocate(child, 8, 9) == () and kv.allocate(parent, 8, 9) == ()
    assert len({*child, *parent}) == 4


def test_writing_inside_a_shared_block_copies_it() -> None:
    """A row that is computed again (a second question on the same prompt) must not write over a sibling's block."""
    kv = KVCacheManager(num_blocks=8, block_size=4)
    parent = kv.new_table()
    kv.allocate(parent, 0, 8)
    child = kv.fork(parent, 8)
    assert [copy.source for copy in kv.allocate(child, 7, 9) or ()] == [parent[1]]


def test_fork_beyond_the_table_is_refused() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    with pytest.raises(ValueError, match="cannot be shared"):
        kv.fork(kv.new_table(), 1)


def test_check_finds_a_lost_and_a_doubly_counted_block() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=1)
    table = kv.new_table()
    kv.allocate(table, 0, 2)
    with pytest.raises(AssertionError):
        kv.check([])
    with pytest.raises(AssertionError):
        kv.check([table, table])
    kv.check([table])


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_conserve_blocks(seed: int) -> None:
    """10,000 random allocations, forks, truncations and frees; the law is checked after each."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 16])
    kv = KVCacheManager(num_blocks=40, block_size=block_size)
    tables: list[tuple[BlockTable, int]] = []  # (table, tokens)
    refused = forked = 0
    for _ in range(10_000):
        action = rng.random()
        if action < 0.25 or not tables:
            tables.append((kv.new_table(), 0))
        elif action < 0.6:
            index = rng.randrange(len(tables))
            table, tokens = tables[index]
            start = max(tokens - rng.randrange(3), 0)
            stop = tokens + rng.randint(1, 3 * block_size)
            before = kv.num_available
            missing = kv.tables.blocks_missing(table, start, stop)
            if kv.allocate(table, start, stop) is None:
                refused += 1
                assert kv.num_available == before < missing
            else:
                assert kv.num_available == before - missing
                tables[index] = (table, stop)
        elif action < 0.8:
            table, tokens = rng.choice(tables)
            at = rng.randint(0, tokens)
            tables.append((kv.fork(table, at), at))
            forked += 1
        elif action < 0.9:
            index = rng.randrange(len(tables))
            table, tokens = tables[index]
            at = rng.randint(0, tokens)
            kv.truncate(table, at)
            tables[index] = (table, at)
        else:
            table, _ = tables.pop(rng.randrange(len(tables)))
            kv.free(table)
        if len(tables) > 30:
            table, _ = tables.pop(0)
            kv.free(table)
        kv.check([table for table, _ in tables])
    assert refused > 10 and forked > 1000 and kv.num_copies > 100
    for table, _ in tables:
        kv.free(table)
    assert kv.num_available == kv.num_blocks
