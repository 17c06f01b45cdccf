"""The KV cache manager: the only part of the room that the scheduler and the verbs see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from octavo.core.plan import BlockCopy
from octavo.kv_cache.block_pool import BlockPool


class KVCacheManager:
    """Block tables over a pool. A table is a list of block ids; block i holds positions [i * block_size, ...)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self.num_copies = 0  # blocks copied on write so far

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is shared."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_missing(self, table: list[int], start: int, stop: int) -> int:
        """Free blocks that `allocate` would take to make positions [start, stop) writable."""
        new = max(self.blocks_for(stop) - len(table), 0)
        return new + sum(1 for _ in self._shared(table, start, stop))

    def allocate(self, table: list[int], start: int, stop: int) -> tuple[BlockCopy, ...] | None:
        """Make positions [start, stop) writable: grow the table, and copy blocks that others share.

        Returns the copies to do before writing, or None, and then nothing has changed, when too few blocks are free.
        """
        if self.blocks_missing(table, start, stop) > self._pool.num_free:
            return None
        copies = []
        for index in list(self._shared(table, start, stop)):
            copy = BlockCopy(source=table[index], target=self._pool.allocate())
            self._pool.release(copy.source)
            table[index] = copy.target
            copies.append(copy)
        while len(table) * self.block_size < stop:
            table.append(self._pool.allocate())
        self.num_copies += len(copies)
        return tuple(copies)

    def _shared(self, table: list[int], start: int, stop: int) -> Iterable[int]:
        """Indices of the existing blocks of [start, stop) that have other owners."""
        for index in range(start // self.block_size, min(self.blocks_for(stop), len(table))):
            if self._pool.ref_count(table[index]) > 1:
                yield index

    def fork(self, table: list[int], num_tokens: int) -> list[int]:
        """A table of the blocks that hold positions [0, num_tokens), shared with `table`."""
        blocks = table[: self.blocks_for(num_tokens)]
        if len(blocks) * self.block_size < num_tokens:
            raise ValueError(f"{num_tokens} tokens cannot be shared from a table of {len(table)} blocks")
        for block in blocks:
            self._pool.share(block)
        return blocks

    def truncate(self, table: list[int], num_tokens: int) -> None:
        """Give back the blocks past position `num_tokens`, the last first."""
        while len(table) > self.blocks_for(num_tokens):
            self._pool.release(table.pop())

    def free(self, table: list[int]) -> None:
        self.truncate(table, 0)

    def check(self, tables: Iterable[list[int]]) -> None:
        """The conservation law, over all live tables: raises AssertionError when a block is lost or counted wrongly."""
        references: Counter[int] = Counter()
        for table in tables:
            references.update(table)
            if len(set(table)) != len(table):
                raise AssertionError(f"a block stands twice in one table: {table}")
        for block in range(self.num_blocks):
            if references[block] != self._pool.ref_count(block):
                count = self._pool.ref_count(block)
                raise AssertionError(f"block {block}: {references[block]} table entries, reference count {count}")
        if self._pool.num_free + len(references) != self.num_blocks:
            raise AssertionError(f"{self._pool.num_free} free + {len(references)} in use != {self.num_blocks} blocks")
