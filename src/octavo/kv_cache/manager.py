"""The KV cache manager: the only part of the room that the scheduler and the verbs see."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from octavo.core.outputs import CacheStats
from octavo.core.plan import BlockCopy, BlockLoad
from octavo.core.protocols import BlockTier
from octavo.kv_cache.block_pool import BlockPool
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.eviction_log import Ending, EndingLog, Evicted, EvictionLog, prefix_hash
from octavo.kv_cache.radix_tree import Key, Node, RadixTree, Root


def _digest_of(above: bytes, key: Key) -> bytes:
    """Names a prefix: 32 bytes over the one before it and its last block of tokens."""
    return hashlib.sha256(above + array("q", key).tobytes()).digest()


# Tells of evictions as they happen: for events.
OnEvict = Callable[[Evicted], None]


class KVCacheManager:
    """Block tables over a pool, and a radix tree of what was computed.

    A block is free, or in use by at least one table, or cached and idle: in the tree and in no table. Idle blocks count
    as available; the one used longest ago gives way first. A block goes into the tree when it is full and committed.
    It is written only while one table refers to it and the tree does not; else it is copied first.

    Args:
        caching: whether requests may use what others computed. If not, each has a tree of its own, from which it is
            restored after a preemption.
        clock: seconds, for ages.
        tier: where evicted blocks go and come back from, if caching.
        identity: all besides tokens and salt that KV depends on; names blocks in the tier.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool = True,
        clock: Callable[[], float] = lambda: 0.0,
        tier: BlockTier | None = None,
        identity: str = "",
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self.caching = caching
        self.stats = CacheStats()
        self.evictions = EvictionLog()
        self.endings = EndingLog()
        self.on_evict: OnEvict | None = None
        self.compute_seconds: float | None = None  # that a block of a prompt takes, as far as is known
        self._clock = clock
        self._tier = tier if caching else None
        self._identity = f"{identity} block_size {block_size}".encode()
        self._loads: dict[int, BlockLoad] = {}  # of the step being made, by block
        self._pool = BlockPool(num_blocks)
        self._tree = RadixTree()

    # --- sizes ---

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free, or cached and idle."""
        return self._pool.num_free + self._tree.num_idle

    @property
    def num_cached(self) -> int:
        """Blocks in the tree, idle or in use."""
        return self._tree.num_nodes

    @property
    def num_copies(self) -> int:
        return self.stats.copied_blocks

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is shared."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # --- tables ---

    def new_table(self, request_id: str = "", salt: str | None = None, reads: bool = True) -> BlockTable:
        """An empty table. Requests with different salts share nothing."""
        return BlockTable(self._namespace(request_id, salt), request_id, reads)

    def _namespace(self, request_id: str, salt: str | None) -> Hashable:
        return ("salt", salt) if self.caching else ("request", request_id)

    def blocks_missing(self, table: BlockTable, start: int, stop: int) -> int:
        """Available blocks that `allocate` would take to make positions [start, stop) writable."""
        new = max(self.blocks_for(stop) - len(table), 0)
        return new + sum(1 for _ in self._shared(table, start, stop))

    def allocate(self, table: BlockTable, start: int, stop: int) -> tuple[BlockCopy, ...] | None:
        """Make positions [start, stop) writable: grow the table, and copy blocks that others share.

        Returns the copies to do before writing, or None, and then nothing has changed, when too few blocks are
        available.
        """
        if self.blocks_missing(table, start, stop) > self.num_available:
            return None
        copies = []
        for index in list(self._shared(table, start, stop)):
            copy = BlockCopy(source=table[index], target=self._take())
            self._release(copy.source)
            table[index] = copy.target
            copies.append(copy)
        self._lower(table, start // self.block_size)
        while len(table) * self.block_size < stop:
            table.append(self._take())
        self.stats.copied_blocks += len(copies)
        return tuple(copies)

    def _shared(self, table: BlockTable, start: int, stop: int) -> Iterator[int]:
        """Indices of the existing blocks of [start, stop) that have other owners."""
        for index in range(start // self.block_size, min(self.blocks_for(stop), len(table))):
            if self._pool.ref_count(table[index]) > 1:
                yield index

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A table of the blocks that hold positions [0, num_tokens), shared with `table`."""
        child = BlockTable(table.namespace, table.request_id, table.reads)
        blocks = table[: self.blocks_for(num_tokens)]
        if len(blocks) * self.block_size < num_tokens:
            raise ValueError(f"{num_tokens} tokens cannot be shared from a table of {len(table)} blocks")
        for block in blocks:
            self._share(block)
        child.extend(blocks)
        child.node, child.indexes = table.node, table.indexes
        self._lower(child, num_tokens // self.block_size)
        return child

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks past position `num_tokens`, the last first."""
        self._lower(table, num_tokens // self.block_size)
        while len(table) > self.blocks_for(num_tokens):
            self._release(table.pop())

    def free(self, table: BlockTable) -> None:
        self.truncate(table, 0)
        table.node, table.indexes = None, True

    def remember_end(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """A sequence ends with these tokens. Before its table is freed; for explanations alone."""
        if self.caching and table.indexes:
            first = table.num_indexed * self.block_size
            if tokens := tuple(token_ids[first : first + self.block_size]):
                before = hash(table.namespace) if table.node is None else table.node.prefix_hash
                self.endings.add(before, tokens, table.request_id)

    def _lower(self, table: BlockTable, num_blocks: int) -> None:
        """Let at most the first `num_blocks` blocks count as the tree's."""
        node = table.node
        while node is not None and node.depth > num_blocks:
            if node.parent is None:  # the cache was reset meanwhile
                table.node, table.indexes = None, False
                return
            node = node.parent
        table.node = node if node is not None and node.depth else None

    # --- references; the tree holds one to each of its blocks ---

    def _take(self) -> int:
        if not self._pool.num_free:
            node = self._tree.least_recent()
            if self._tier is not None:
                self._tier.save(self._digest(node), node.key, node.block)
            self._tree.remove(node)
            self._evicted(node, "capacity")
        return self._pool.allocate()

    def _evicted(self, node: Node, reason: str) -> None:
        """The node is leaving: its reference goes."""
        self._pool.release(node.block)
        self.stats.evicted_blocks += 1
        evicted = self.evictions.add(node, reason, self._clock())
        if self.on_evict is not None:
            self.on_evict(evicted)

    def _share(self, block: int) -> None:
        if self._pool.share(block) == 2 and (node := self._tree.node_of(block)) is not None:
            self._tree.set_used(node)

    def _release(self, block: int) -> None:
        left = self._pool.release(block)
        if left == 1 and (node := self._tree.node_of(block)) is not None:
            self._tree.set_idle(node)
        elif left == 0:
            self._loads.pop(block, None)  # given up in the very step it was to be loaded

    # --- the prefix cache ---

    def match(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, limit: int) -> int:
        """Take from the tree the blocks that follow the `num_computed` tokens already there, up to `limit` tokens.

        Returns how many tokens the table holds KV of now. Of a block a part is taken only where `limit` cuts it.
        """
        node = self._node(table)
        if not table.reads or not table.indexes or table.num_indexed < num_computed // self.block_size:
            return num_computed
        for child in self._tree.walk(node, token_ids, self.block_size):
            stop = min(child.depth * self.block_size, limit)
            if stop <= num_computed:
                break
            for block in table[child.depth - 1 :]:  # a part of this block that was computed here
                self._release(block)
            del table[child.depth - 1 :]
            self._share(child.block)
            table.append(child.block)
            if child.depth * self.block_size <= limit:
                table.node = child
            self.stats.hit_tokens += stop - num_computed
            num_computed = stop
        if self._tier is not None and table.num_indexed * self.block_size == num_computed:
            num_computed = self._load(table, token_ids, limit)
        return num_computed

    def _load(self, table: BlockTable, token_ids: Sequence[int], limit: int) -> int:
        """Take blocks from the tier, past those of the tree. They go into the tree when a step has used them."""
        assert self._tier is not None
        size = self.block_size
        digest = self._root_digest(table.namespace) if table.node is None else self._digest(table.node)
        start = table.num_indexed * size
        while start + size <= limit and self.num_available > 0:
            key = tuple(token_ids[start : start + size])
            digest = _digest_of(digest, key)
            kv = self._tier.load(digest, key, self.compute_seconds)
            if kv is None:
                break
            for block in table[start // size :]:  # a part of this block that was computed here
                self._release(block)
            del table[start // size :]
            block = self._take()
            table.append(block)
            self._loads[block] = BlockLoad(block, kv)
            self.stats.loaded_blocks += 1
            self.stats.hit_tokens += size
            start += size
        return start

    def take_loads(self) -> tuple[BlockLoad, ...]:
        """Loads to be done in the next step, before anything reads or writes their blocks."""
        loads, self._loads = tuple(self._loads.values()), {}
        return loads

    def _digest(self, node: Node) -> bytes:
        if node.digest is None:
            assert node.parent is not None
            above = self._root_digest(node.parent.namespace) if isinstance(node.parent, Root) else None
            node.digest = _digest_of(above or self._digest(node.parent), node.key)
        return node.digest

    def _root_digest(self, namespace: Hashable) -> bytes:
        return hashlib.sha256(self._identity + repr(namespace).encode()).digest()

    def _node(self, table: BlockTable) -> Node | None:
        """Where the table stands in the tree; what was begun before a reset stays out of it from here on."""
        node = table.node
        if node is None:
            return self._tree.root(table.namespace)
        if node.parent is None:
            table.node, table.indexes = None, False
        return table.node

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """KV of the first `num_computed` tokens is there: blocks that are full by now go into the tree.

        Where the tree has such a block already, the table takes that one, and its own goes home.
        """
        size = self.block_size
        if num_computed // size <= table.num_indexed or not table.indexes:
            return
        node = self._node(table)
        if not table.indexes:
            return
        for index in range(table.num_indexed, num_computed // size):
            key = tuple(token_ids[index * size : (index + 1) * size])
            child = None if node is None else node.children.get(key)
            if child is None:
                self._pool.share(table[index])
                child = self._tree.insert(node, table.namespace, key, table[index], table.request_id, self._clock())
                self.stats.inserted_blocks += 1
            elif child.block != table[index]:
                if not table.reads:
                    table.indexes = False
                    return
                self._share(child.block)
                self._release(table[index])
                table[index] = child.block
            table.node = node = child

    def pending_block(self, table: BlockTable, token_ids: Sequence[int], target: int) -> Hashable:
        """Which block comes next that can be cached; None if none will be full when `target` tokens are computed.

        Two tables with the same answer are about to compute the same block.
        """
        start = table.num_indexed * self.block_size
        if start + self.block_size > target or not table.indexes or not table.reads:
            return None
        before = table.namespace if table.node is None else id(table.node)
        return before, tuple(token_ids[start : start + self.block_size])

    def probe(self, table: BlockTable, token_ids: Sequence[int], known: Node | None) -> Node | None:
        """The deepest node whose prefix begins `token_ids`, or None. `known` is an earlier answer, to go on from."""
        if not table.reads:
            return None
        deepest = known if known is not None and known.parent is not None else None
        for node in self._tree.walk(deepest or self._tree.root(table.namespace), token_ids, self.block_size):
            deepest = node
        return deepest

    def find(self, token_ids: Sequence[int], salt: str | None) -> list[Node]:
        """The nodes of the longest cached prefix of whole blocks, first block first. Takes nothing."""
        return list(self._tree.walk(self._tree.root(self._namespace("", salt)), token_ids, self.block_size))

    def children(self, path: list[Node], salt: str | None) -> list[Node]:
        """What is cached right behind a path that `find` gave."""
        parent = path[-1] if path else self._tree.root(self._namespace("", salt))
        return [] if parent is None else list(parent.children.values())

    def find_kept(self, path: list[Node], token_ids: Sequence[int], salt: str | None) -> int:
        """How many blocks behind a path that `find` gave the tier has. Loads nothing."""
        if self._tier is None:
            return 0
        digest = self._digest(path[-1]) if path else self._root_digest(self._namespace("", salt))
        size = self.block_size
        number = len(path)
        while (number + 1) * size <= len(token_ids):
            digest = _digest_of(digest, tuple(token_ids[number * size : (number + 1) * size]))
            if not self._tier.has(digest):
                break
            number += 1
        return number - len(path)

    def find_endings(self, token_ids: Sequence[int], salt: str | None, num_blocks: int) -> Iterator[Ending]:
        """How requests ended that had these tokens' first blocks and then no whole one that is cached."""
        prefix = prefix_hash(self._namespace("", salt), token_ids, self.block_size, num_blocks)
        return self.endings.after(prefix)

    def find_evicted(self, token_ids: Sequence[int], salt: str | None, depth: int) -> Evicted | None:
        """The eviction of the block number depth - 1 of these tokens, if it is remembered."""
        return self.evictions.find(self._namespace("", salt), token_ids, self.block_size, depth)

    def end_request(self, request_id: str) -> None:
        """The request has ended and has no tables left. Without caching across requests, so does its tree."""
        if not self.caching:
            namespace = self._namespace(request_id, None)
            for node in reversed(self._tree.below(namespace)):
                self._tree.remove(node)
                self._pool.release(node.block)

    def reset(self) -> int:
        """Forget everything cached; blocks in use stay with their tables. Returns how many blocks were forgotten."""
        nodes = sorted(self._tree.nodes(), key=lambda node: -node.depth)
        for node in nodes:
            self._tree.remove(node)
            self._evicted(node, "reset")
        return len(nodes)

    # --- the conservation law ---

    def check(self, tables: Iterable[BlockTable]) -> None:
        """The conservation law, over all live tables: raises AssertionError when a block is lost or counted wrongly."""
        in_tables: Counter[int] = Counter()
        for table in tables:
            in_tables.update(table)
            if len(set(table)) != len(table):
                raise AssertionError(f"a block stands twice in one table: {table}")
            self._check_indexed(table)
        idle = 0
        for block in range(self.num_blocks):
            node = self._tree.node_of(block)
            references = in_tables[block] + (node is not None)
            if references != self._pool.ref_count(block):
                count = self._pool.ref_count(block)
                raise AssertionError(f"block {block}: {references} references found, reference count {count}")
            if node is not None and node.idle != (not in_tables[block]):
                raise AssertionError(f"block {block}: idle is {node.idle}, and it is in {in_tables[block]} tables")
            idle += node is not None and not in_tables[block]
        if self._pool.num_free + idle + len(in_tables) != self.num_blocks or idle != self._tree.num_idle:
            counts = f"{self._pool.num_free} free + {idle} idle ({self._tree.num_idle}) + {len(in_tables)} in use"
            raise AssertionError(f"{counts} != {self.num_blocks} blocks")

    def _check_indexed(self, table: BlockTable) -> None:
        node = table.node
        if node is None or (node.parent is None and node.depth):
            return  # nothing indexed, or indexed in a tree that was reset
        blocks = [above.block for above in node.path()][::-1]
        if blocks != table[: len(blocks)]:
            raise AssertionError(f"the table {table} is not on its path of the tree, {blocks}")
