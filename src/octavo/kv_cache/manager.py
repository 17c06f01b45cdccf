"""The KV cache manager: the only part of the room that the scheduler and the verbs see."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence

from octavo.core.outputs import CacheStats
from octavo.core.plan import BlockCopy, BlockLoad
from octavo.core.protocols import BlockTier
from octavo.kv_cache.block_pool import BlockPool
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.eviction_log import Ending, EndingLog, Evicted, EvictionLog, prefix_hash
from octavo.kv_cache.radix_tree import Key, Node, RadixTree, Root
from octavo.kv_cache.tier_loads import GIVE_UP_SECONDS, Load, TierLoads


def _digest_of(above: bytes, key: Key) -> bytes:
    """Names a prefix: 32 bytes over the one before it and its last block of tokens."""
    return hashlib.sha256(above + array("q", key).tobytes()).digest()


def _shared(salt: str | None) -> Hashable:
    """The namespace of all requests with this salt."""
    return "salt", salt


def _private(request_id: str) -> Hashable:
    """The namespace of one request."""
    return "request", request_id


def _is_shared(namespace: Hashable) -> bool:
    return isinstance(namespace, tuple) and namespace[0] == "salt"


# Tells of evictions as they happen: for events.
OnEvict = Callable[[Evicted], None]


class KVCacheManager:
    """Block tables over a pool, and a radix tree of what was computed.

    A block is free, or in use by at least one table, or cached and idle: in the tree and in no table. Idle blocks count
    as available; the one used longest ago gives way first. A block goes into the tree when it is full and committed.
    It is written only while one table refers to it and the tree does not; else it is copied first.

    A table's namespace says what it can find: what all requests of a salt share, or, of one that is to read nothing of
    others', what it computed itself, which goes over to the shared one when the request ends.

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
        self._loads = TierLoads()
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

    def new_table(self, request_id: str = "", salt: str | None = None, private: bool = False) -> BlockTable:
        """An empty table. Requests with different salts share nothing, and a private one nothing with any other."""
        namespace = _private(request_id) if private or not self.caching else _shared(salt)
        return BlockTable(namespace, request_id)

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
        child = BlockTable(table.namespace, table.request_id)
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
        if self.caching and table.indexes and _is_shared(table.namespace):
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
            if self._tier is not None and _is_shared(node.namespace):
                digest = self._digest(node)
                self._loads.renew(digest)
                self._tier.save(digest, node.key, node.block)
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
        if self._pool.release(block) == 1 and (node := self._tree.node_of(block)) is not None:
            self._tree.set_idle(node)

    # --- the prefix cache ---

    def match(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, limit: int) -> int:
        """Take from the tree the blocks that follow the `num_computed` tokens already there, up to `limit` tokens.

        Returns how many tokens the table holds KV of now. Of a block a part is taken only where `limit` cuts it.
        """
        node = self._node(table)
        table.awaits = None
        if not table.indexes or table.num_indexed < num_computed // self.block_size:
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
            self._ask_tier(self._tier, table, token_ids, limit)
        return num_computed

    # --- from the tier ---

    def _ask_tier(self, tier: BlockTier, table: BlockTable, token_ids: Sequence[int], limit: int) -> None:
        """Begin to load what follows the table's last block, as far as the tier has it."""
        if not _is_shared(table.namespace):
            return
        size = self.block_size
        digest = self._root_digest(table.namespace) if table.node is None else self._digest(table.node)
        parent: Node | Load | None = table.node
        for start in range(table.num_indexed * size, limit - size + 1, size):
            key = tuple(token_ids[start : start + size])
            digest = _digest_of(digest, key)
            load = self._loads.get(digest)
            if load is None:
                future = tier.load(digest, key, self.compute_seconds) if self._loads.may_begin(digest) else None
                if future is None:
                    return
                load = Load(digest, parent, table.namespace, key, table.request_id, future, self._clock())
                self._loads.begin(load)
            table.awaits = table.awaits or digest
            parent = load

    def awaits_load(self, table: BlockTable) -> bool:
        """Whether the block that comes next is on its way from the tier, as `match` found last."""
        return table.awaits in self._loads

    @property
    def num_loading(self) -> int:
        """Blocks on their way from the tier."""
        return len(self._loads)

    def wait_for_loads(self, seconds: float) -> None:
        """Until one more block has come from the tier, at most so long."""
        self._loads.wait(seconds)

    def take_loads(self) -> tuple[BlockLoad, ...]:
        """Loads to be done in the next step, of blocks that nobody uses yet. `settle_loads` says how they went."""
        self.settle_loads(())
        loads = []
        now = self._clock()
        for load, kv in self._loads.ready(now):
            if self.num_available:
                block = self._take()
                self._loads.place(load, block)
                loads.append(BlockLoad(block, kv))
            elif now - load.since > GIVE_UP_SECONDS:  # nobody makes room for it: it is waited for no more
                self._loads.end(load, failed=True)
        return tuple(loads)

    def settle_loads(self, written: Collection[int]) -> None:
        """The step has returned: of the blocks it was to load those that were written go into the tree; the others are
        given back."""
        placed, self._loads.placed = self._loads.placed, []
        for load in placed:
            assert load.block is not None
            done = load.block in written
            parent, lost = load.parent_node, load.is_lost
            above = parent if parent is not None else self._tree.root(load.namespace)
            load.node = None if lost or above is None else above.children.get(load.key)
            if done and not lost and load.node is None:
                request_id, now = load.request_id, self._clock()
                load.node = self._tree.insert(parent, load.namespace, load.key, load.block, request_id, now)
                self._tree.set_idle(load.node)
                self.stats.loaded_blocks += 1
            else:
                self._pool.release(load.block)
            self._loads.end(load, failed=load.node is None, unusable=not done)

    def forget_loads(self) -> None:
        """In a forked child: nobody reads for it."""
        self._loads.forget()

    def _digest(self, node: Node) -> bytes:
        unnamed = []
        above: Node | None = node
        while above is not None and above.parent is not None and above.digest is None:
            unnamed.append(above)
            above = above.parent
        assert above is not None
        digest = self._root_digest(above.namespace) if isinstance(above, Root) else above.digest
        for one in reversed(unnamed):
            assert digest is not None
            digest = one.digest = _digest_of(digest, one.key)
        assert digest is not None
        return digest

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
                self._share(child.block)
                self._release(table[index])
                table[index] = child.block
            table.node = node = child

    def pending_block(self, table: BlockTable, token_ids: Sequence[int], target: int) -> Hashable:
        """Which block comes next that can be cached; None if none will be full when `target` tokens are computed.

        Two tables with the same answer are about to compute the same block.
        """
        start = table.num_indexed * self.block_size
        if start + self.block_size > target or not table.indexes:
            return None
        before = table.namespace if table.node is None else id(table.node)
        return before, tuple(token_ids[start : start + self.block_size])

    def probe(self, table: BlockTable, token_ids: Sequence[int], known: Node | None) -> Node | None:
        """The deepest node whose prefix begins `token_ids`, or None. `known` is an earlier answer, to go on from."""
        deepest = known if known is not None and known.parent is not None else None
        for node in self._tree.walk(deepest or self._tree.root(table.namespace), token_ids, self.block_size):
            deepest = node
        return deepest

    def find(self, token_ids: Sequence[int], salt: str | None) -> list[Node]:
        """The nodes of the longest cached prefix of whole blocks, first block first. Takes nothing."""
        return list(self._tree.walk(self._tree.root(_shared(salt)), token_ids, self.block_size))

    def children(self, path: list[Node], salt: str | None) -> list[Node]:
        """What is cached right behind a path that `find` gave."""
        parent = path[-1] if path else self._tree.root(_shared(salt))
        return [] if parent is None else list(parent.children.values())

    def find_kept(self, path: list[Node], token_ids: Sequence[int], salt: str | None) -> int:
        """How many blocks behind a path that `find` gave the tier has. Loads nothing."""
        if self._tier is None:
            return 0
        digest = self._digest(path[-1]) if path else self._root_digest(_shared(salt))
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
        prefix = prefix_hash(_shared(salt), token_ids, self.block_size, num_blocks)
        return self.endings.after(prefix)

    def find_evicted(self, token_ids: Sequence[int], salt: str | None, depth: int) -> Evicted | None:
        """The eviction of the block number depth - 1 of these tokens, if it is remembered."""
        return self.evictions.find(_shared(salt), token_ids, self.block_size, depth)

    def end_request(self, request_id: str, salt: str | None = None) -> None:
        """The request has ended and has no tables left. What it had cached for itself alone goes over to the others, or
        home if nothing is shared."""
        if self.caching:
            for block in self._tree.merge(_private(request_id), _shared(salt)):
                self._pool.release(block)
        else:
            for node in reversed(self._tree.below(_private(request_id))):
                self._tree.remove(node)
                self._pool.release(node.block)

    def reset(self) -> int:
        """Forget everything cached, in the tier as well; blocks in use stay with their tables. Returns how many blocks
        of memory were forgotten."""
        self._loads.forget()
        if self._tier is not None:
            self._tier.clear()
        nodes = sorted(self._tree.nodes(), key=lambda node: -node.depth)
        for node in nodes:
            self._tree.remove(node)
            self._evicted(node, "reset")
        return len(nodes)

    def close(self) -> None:
        """No request is left: the tier keeps what is cached, as far as it has room, the last used above all."""
        if self._tier is not None:
            self._loads.forget()
            nodes = sorted(self._tree.nodes(), key=lambda node: node.last_used)
            self._tier.keep([(self._digest(n), n.key, n.block) for n in nodes if _is_shared(n.namespace)])

    # --- the conservation law ---

    def check(self, tables: Iterable[BlockTable]) -> None:
        """The conservation law, over all live tables: raises AssertionError when a block is lost or counted wrongly."""
        in_tables: Counter[int] = Counter(load.block for load in self._loads.placed if load.block is not None)
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
