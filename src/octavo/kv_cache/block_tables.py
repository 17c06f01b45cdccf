"""Block tables over the pool: which block holds which positions of which sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from octavo.core.namespace import SHARED, Namespace
from octavo.core.plan import BlockCopy
from octavo.kv_cache.block_pool import BlockPool

if TYPE_CHECKING:
    from octavo.core.outputs import CacheStats
    from octavo.kv_cache.radix_tree import Node


class BlockTable(list[int]):
    """Block ids; block i holds positions [i * block_size, ...). Changed by this room alone.

    The first `node.depth` blocks are those of the radix tree on the way from its root to `node`.
    """

    __slots__ = ("awaits", "indexes", "namespace", "node", "request_id")

    def __init__(self, namespace: Namespace = SHARED, request_id: str = "") -> None:
        super().__init__()
        self.namespace = namespace
        self.request_id = request_id
        self.node: Node | None = None  # None: at the root, which is made when it is needed
        self.indexes = True  # whether blocks that fill up still go into the tree
        self.awaits: bytes | None = None  # digest of the next block, if the tier was asked for it when last matched

    @property
    def num_indexed(self) -> int:
        """Blocks that are the tree's."""
        return 0 if self.node is None else self.node.depth

    def lower(self, num_blocks: int) -> None:
        """Let at most the first `num_blocks` blocks count as the tree's."""
        node = self.node
        while node is not None and node.depth > num_blocks:
            if node.parent is None:  # the cache was reset meanwhile
                self.node, self.indexes = None, False
                return
            node = node.parent
        self.node = node if node is not None and node.depth else None


class CachedBlocks(Protocol):
    """The prefix cache as tables know it: it refers once to each of its blocks."""

    @property
    def num_idle(self) -> int:
        """Its blocks that no table refers to."""
        ...

    def evict(self) -> None:
        """Give up one of these. There is one."""
        ...

    def set_used(self, block: int) -> None:
        """A table refers to the block now; if it is one of the cache's, it was idle."""
        ...

    def set_idle(self, block: int) -> None:
        """No table refers to it any more."""
        ...


class BlockTables:
    """The tables over one pool. A block is written only while nothing but one table refers to it; else it is copied
    first."""

    def __init__(self, num_blocks: int, block_size: int, stats: CacheStats) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cached: CachedBlocks | None = None
        self._stats = stats

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free, or cached and idle."""
        return self.pool.num_free + (0 if self.cached is None else self.cached.num_idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # --- references ---

    def allocate_block(self) -> int:
        """An available block, with one reference."""
        if not self.pool.num_free and self.cached is not None:
            self.cached.evict()
        return self.pool.allocate()

    def share(self, block: int) -> None:
        if self.pool.share(block) == 2 and self.cached is not None:
            self.cached.set_used(block)

    def release(self, block: int) -> None:
        if self.pool.release(block) == 1 and self.cached is not None:
            self.cached.set_idle(block)

    # --- tables ---

    def blocks_missing(self, table: BlockTable, start: int, stop: int) -> int:
        """Available blocks that `allocate` would take to make positions [start, stop) writable."""
        return max(self.blocks_for(stop) - len(table), 0) + len(self._shared(table, start, stop))

    def allocate(self, table: BlockTable, start: int, stop: int) -> tuple[BlockCopy, ...] | None:
        """Make positions [start, stop) writable: grow the table, and copy blocks that others share.

        Returns the copies to do before writing, or None, and then nothing has changed, when too few blocks are
        available.
        """
        shared = self._shared(table, start, stop)
        missing = max(self.blocks_for(stop) - len(table), 0) + len(shared)
        if missing > self.num_available:
            return None
        copies = []
        for index in shared:
            copy = BlockCopy(source=table[index], target=self.allocate_block())
            self.release(copy.source)
            table[index] = copy.target
            copies.append(copy)
        table.lower(start // self.block_size)
        while len(table) * self.block_size < stop:
            table.append(self.allocate_block())
        self._stats.copied_blocks += len(copies)
        return tuple(copies)

    def _shared(self, table: BlockTable, start: int, stop: int) -> list[int]:
        """Indices of the existing blocks of [start, stop) that have other owners."""
        indices = range(start // self.block_size, min(self.blocks_for(stop), len(table)))
        return [index for index in indices if self.pool.ref_count(table[index]) > 1]

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A table of the blocks that hold positions [0, num_tokens), shared with `table`."""
        child = BlockTable(table.namespace, table.request_id)
        blocks = table[: self.blocks_for(num_tokens)]
        if len(blocks) * self.block_size < num_tokens:
            raise ValueError(f"{num_tokens} tokens cannot be shared from a table of {len(table)} blocks")
        for block in blocks:
            self.share(block)
        child.extend(blocks)
        child.node, child.indexes = table.node, table.indexes
        child.lower(num_tokens // self.block_size)
        self._stats.forked_tokens += num_tokens
        return child

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks past position `num_tokens`, the last first."""
        table.lower(num_tokens // self.block_size)
        while len(table) > self.blocks_for(num_tokens):
            self.release(table.pop())

    def free(self, table: BlockTable) -> None:
        self.truncate(table, 0)
        table.node, table.indexes = None, True
