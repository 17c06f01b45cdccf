"""The prefix cache: a radix tree of what was computed, and the tier that its blocks go to when they leave memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import islice

from octavo.core.namespace import Namespace
from octavo.core.outputs import CacheStats
from octavo.core.plan import BlockLoad
from octavo.core.protocols import BlockTier
from octavo.kv_cache.block_tables import BlockTable, BlockTables
from octavo.kv_cache.radix_tree import Key, Node, RadixTree, Root
from octavo.kv_cache.tier_loads import GIVE_UP_SECONDS, Load, TierLoads

_LOOKED_AT = 64  # blocks that may begin like one that is looked for
OnEvict = Callable[[Node, str], None]  # the node, which is in the tree no longer, and why: "capacity" or "reset"


class CachedPrefix:
    """How far a prompt was found in the cache when it was last looked up. What it names may leave the cache."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def node(self) -> Node | None:
        """None: it has left the cache."""
        return self._node if self._node.parent is not None else None

    @property
    def num_blocks(self) -> int:
        return self._node.depth

    @property
    def num_in_use(self) -> int:
        """Those of its blocks that some table refers to: to share them takes nothing from what is available."""
        return sum(not node.idle for node in self._node.path())


class PrefixCache:
    """A block goes into the tree when it is full and committed, and out of it, idle blocks alone, when its memory is
    needed: the one used longest ago first. It goes to the tier then, and may come back from there.

    Args:
        clock: seconds, for ages.
        tier: where evicted blocks go and come back from.
        identity: all besides tokens and namespace that KV depends on; names blocks in the tier.
        on_evict: told of each block that leaves.
    """

    def __init__(
        self,
        tables: BlockTables,
        stats: CacheStats,
        clock: Callable[[], float],
        tier: BlockTier | None,
        identity: bytes,
        on_evict: OnEvict,
    ) -> None:
        self.tree = RadixTree()
        self.loads = TierLoads()
        self.tier = tier
        self.compute_seconds: float | None = None  # that a block of a prompt takes, as far as is known
        self._tables = tables
        self._stats = stats
        self._clock = clock
        self._identity = identity
        self._on_evict = on_evict
        self._size = tables.block_size
        tables.cached = self

    # --- what tables refer to; see CachedBlocks ---

    @property
    def num_idle(self) -> int:
        return self.tree.num_idle

    def set_used(self, block: int) -> None:
        if (node := self.tree.node_of(block)) is not None:
            self.tree.set_used(node)

    def set_idle(self, block: int) -> None:
        if (node := self.tree.node_of(block)) is not None:
            self.tree.set_idle(node)

    def evict(self) -> None:
        node = self.tree.least_recent()
        if self.tier is not None and not node.namespace.is_private:
            digest = self.digest(node)
            self.loads.renew(digest)
            self.tier.save(digest, node.key, node.block)
        self._remove(node, "capacity")

    def _remove(self, node: Node, reason: str) -> None:
        self.tree.remove(node)
        self._tables.pool.release(node.block)
        self._stats.evicted_blocks += 1
        self._on_evict(node, reason)

    # --- in and out of tables ---

    def match(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, limit: int) -> int:
        """Take from the tree the blocks that follow the `num_computed` tokens already there, up to `limit` tokens.

        Returns how many tokens the table holds KV of now. Of a last block that goes on differently, or is cut by
        `limit`, the first part is taken: whoever writes behind it writes into a copy.
        """
        node = self._node(table)
        table.awaits = None
        if not table.indexes or table.num_indexed < num_computed // self._size:
            return num_computed
        for child in self.tree.walk(node, token_ids, self._size):
            stop = min(child.depth * self._size, limit)
            if stop <= num_computed:
                break
            for block in table[child.depth - 1 :]:  # a part of this block that was computed here
                self._tables.release(block)
            del table[child.depth - 1 :]
            self._tables.share(child.block)
            table.append(child.block)
            if child.depth * self._size <= limit:
                table.node = child
            self._stats.hit_tokens += stop - num_computed
            num_computed = stop
        if table.num_indexed * self._size == num_computed:
            if self.tier is not None:
                self._ask_tier(self.tier, table, token_ids, limit)
            if table.awaits is None:
                num_computed += self._take_part(table, token_ids, num_computed, limit)
        return num_computed

    def _take_part(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, limit: int) -> int:
        """Take the beginning of a block; how many tokens."""
        node = table.node or self.tree.root(table.namespace)
        found, length = self.closest(node, token_ids[num_computed : min(num_computed + self._size, limit)])
        if found is None:
            return 0
        for block in table[found.depth - 1 :]:
            self._tables.release(block)
        del table[found.depth - 1 :]
        self._tables.share(found.block)
        table.append(found.block)
        self._stats.hit_tokens += length
        return length

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """KV of the first `num_computed` tokens is there: blocks that are full by now go into the tree.

        Where the tree has such a block already, the table takes that one, and its own goes home.
        """
        size = self._size
        if num_computed // size <= table.num_indexed or not table.indexes:
            return
        node = self._node(table)
        if not table.indexes:
            return
        for index in range(table.num_indexed, num_computed // size):
            key = tuple(token_ids[index * size : (index + 1) * size])
            child = None if node is None else node.children.get(key)
            if child is None:
                self._tables.pool.share(table[index])
                child = self.tree.insert(node, table.namespace, key, table[index], table.request_id, self._clock())
                self._stats.inserted_blocks += 1
            elif child.block != table[index]:
                self._tables.share(child.block)
                self._tables.release(table[index])
                table[index] = child.block
            table.node = node = child

    def _node(self, table: BlockTable) -> Node | None:
        """Where the table stands in the tree; what was begun before a reset stays out of it from here on."""
        node = table.node
        if node is None:
            return self.tree.root(table.namespace)
        if node.parent is None:
            table.node, table.indexes = None, False
        return table.node

    # --- questions ---

    def pending_block(self, table: BlockTable, token_ids: Sequence[int], target: int) -> Hashable:
        """Which block comes next that can be cached; None if none will be full when `target` tokens are computed.

        Two tables with the same answer are about to compute the same block.
        """
        start = table.num_indexed * self._size
        if start + self._size > target or not table.indexes:
            return None
        before: Hashable = table.namespace if table.node is None else id(table.node)
        return before, tuple(token_ids[start : start + self._size])

    def give_part_back(self, table: BlockTable, num_computed: int) -> int:
        """Of a block of the cache's that is the table's last, of which a part alone is used and which nobody else
        uses: leave it, so that it counts as available. Returns how many tokens the table holds KV of then."""
        start = num_computed // self._size * self._size
        if start == num_computed:
            return num_computed
        block = table[start // self._size]
        if self.tree.node_of(block) is None or self._tables.pool.ref_count(block) > 2:
            return num_computed
        self._tables.truncate(table, start)
        return start

    def closest(self, node: Node | None, token_ids: Sequence[int]) -> tuple[Node | None, int]:
        """Of the blocks behind `node` the one that begins most like these tokens, and for how many of them. None if
        there is none that begins like them, among those that came last."""
        found, length = None, 0
        for child in () if node is None else islice(reversed(node.children.values()), _LOOKED_AT):
            if (same := common(child.key, token_ids)) > length:
                found, length = child, same
        return found, length

    def cached_prefix(
        self, table: BlockTable, token_ids: Sequence[int], known: CachedPrefix | None
    ) -> CachedPrefix | None:
        """How much of these tokens is cached, in whole blocks; None: nothing. `known` is an earlier answer, to go on
        from."""
        deepest = None if known is None else known.node
        start = deepest or self.tree.root(table.namespace)
        for node in self.tree.walk(start, token_ids, self._size):
            deepest = node
        return None if deepest is None else CachedPrefix(deepest)

    # --- ending ---

    def merge(self, private: Namespace) -> None:
        """What a request had cached for itself alone goes over to the others, or home where they have it."""
        for block in self.tree.merge(private, private.shared):
            self._tables.pool.release(block)

    def forget(self, namespace: Namespace) -> None:
        """What is cached there, none of it in use, goes home."""
        for node in reversed(self.tree.below(namespace)):
            self.tree.remove(node)
            self._tables.pool.release(node.block)

    def reset(self) -> int:
        """Forget everything cached, in the tier as well; blocks in use stay with their tables. Returns how many blocks
        of memory were forgotten."""
        self.loads.forget()
        if self.tier is not None:
            self.tier.clear()
        nodes = sorted(self.tree.nodes(), key=lambda node: -node.depth)
        for node in nodes:
            self._remove(node, "reset")
        return len(nodes)

    def close(self) -> None:
        """No request is left: the tier keeps what is cached, as far as it has room, the last used above all."""
        if self.tier is not None:
            self.loads.forget()
            nodes = sorted(self.tree.nodes(), key=lambda node: node.last_used)
            self.tier.keep([(self.digest(n), n.key, n.block) for n in nodes if not n.namespace.is_private])

    # --- from the tier ---

    def _ask_tier(self, tier: BlockTier, table: BlockTable, token_ids: Sequence[int], limit: int) -> None:
        """Begin to load what follows the table's last block, as far as the tier has it."""
        if table.namespace.is_private:
            return
        size = self._size
        digest = self.digest_of(table.namespace, table.node)
        parent: Node | Load | None = table.node
        for start in range(table.num_indexed * size, limit - size + 1, size):
            key = tuple(token_ids[start : start + size])
            digest = extended(digest, key)
            load = self.loads.get(digest)
            if load is None:
                future = tier.load(digest, key, self.compute_seconds) if self.loads.may_begin(digest) else None
                if future is None:
                    return
                load = Load(digest, parent, table.namespace, key, table.request_id, future, self._clock())
                self.loads.begin(load)
            table.awaits = table.awaits or digest
            parent = load

    def take_loads(self) -> tuple[BlockLoad, ...]:
        """Loads to be done in the next step, of blocks that nobody uses yet. `settle_loads` says how they went."""
        self.settle_loads(())
        loads = []
        now = self._clock()
        for load, kv in self.loads.ready(now):
            if self._tables.num_available:
                block = self._tables.allocate_block()
                self.loads.place(load, block)
                loads.append(BlockLoad(block, kv, load.key))
            elif now - load.since > GIVE_UP_SECONDS:  # nobody makes room for it: it is waited for no more
                self.loads.end(load, failed=True)
        return tuple(loads)

    def settle_loads(self, written: Collection[int]) -> None:
        """The step has returned: of the blocks it was to load those that were written go into the tree; the others are
        given back."""
        placed, self.loads.placed = self.loads.placed, []
        for load in placed:
            assert load.block is not None
            done = load.block in written
            parent, lost = load.parent_node, load.is_lost
            above = parent if parent is not None else self.tree.root(load.namespace)
            load.node = None if lost or above is None else above.children.get(load.key)
            if done and not lost and load.node is None:
                request_id, now = load.request_id, self._clock()
                load.node = self.tree.insert(parent, load.namespace, load.key, load.block, request_id, now)
                self.tree.set_idle(load.node)
                self._stats.loaded_blocks += 1
            else:
                self._tables.pool.release(load.block)
            self.loads.end(load, failed=load.node is None, unusable=not done)

    # --- names of prefixes in the tier ---

    def digest_of(self, namespace: Namespace, node: Node | None) -> bytes:
        """Of a prefix in a namespace; None is the empty one."""
        return self._root_digest(namespace) if node is None else self.digest(node)

    def digest(self, node: Node) -> bytes:
        unnamed = []
        above: Node | None = node
        while above is not None and above.parent is not None and above.digest is None:
            unnamed.append(above)
            above = above.parent
        assert above is not None
        digest = self._root_digest(above.namespace) if isinstance(above, Root) else above.digest
        for one in reversed(unnamed):
            assert digest is not None
            digest = one.digest = extended(digest, one.key)
        assert digest is not None
        return digest

    def _root_digest(self, namespace: Namespace) -> bytes:
        return hashlib.sha256(self._identity + repr(tuple(namespace)).encode()).digest()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def extended(above: bytes, key: Key) -> bytes:
    """Names a prefix: 32 bytes over the one before it and its last block of tokens."""
    return hashlib.sha256(above + array("q", key).tobytes()).digest()
