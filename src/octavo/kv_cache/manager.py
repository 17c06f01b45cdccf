"""The KV cache manager: the only part of the room that the scheduler and the verbs see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

from octavo.core.namespace import SHARED, Namespace
from octavo.core.outputs import CacheExplanation, CacheStats
from octavo.core.plan import BlockCopy, BlockLoad
from octavo.core.protocols import BlockTier
from octavo.kv_cache.block_tables import BlockTable, BlockTables
from octavo.kv_cache.eviction_log import Evicted
from octavo.kv_cache.explanations import Explanations
from octavo.kv_cache.prefix_cache import CachedPrefix, PrefixCache
from octavo.kv_cache.radix_tree import Node


class PendingKV(NamedTuple):
    """What a sequence still has to compute: positions [start, stop) of its tokens."""

    table: BlockTable
    token_ids: Sequence[int]
    start: int
    stop: int


class KVCacheManager:
    """Block tables over a pool, a prefix cache of what was computed, and explanations of what it finds.

    A block is free, or in use by at least one table, or cached and idle: in the cache and in no table. Idle blocks
    count as available.

    A table's namespace says what it can find: what all requests of a salt share, or, of one that is to read nothing of
    others', what it computed itself, which goes over to the shared one when the request ends.

    Args:
        caching: whether requests may use what others computed. If not, each has a namespace of its own, from which it
            is restored after a preemption.
        clock: seconds, for ages.
        tier: where evicted blocks go and come back from, if caching.
        identity: all besides tokens and namespace that KV depends on; names blocks in the tier.
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
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.caching = caching
        self.stats = CacheStats()
        self.on_evict: Callable[[Evicted], None] | None = None  # told of evictions as they happen
        self.tables = BlockTables(num_blocks, block_size, self.stats)
        self.prefixes = PrefixCache(
            self.tables,
            self.stats,
            clock,
            tier if caching else None,
            f"{identity} block_size {block_size}".encode(),
            self._note_eviction,
        )
        self.explanations = Explanations(clock, block_size)

    # --- sizes ---

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free, or cached and idle."""
        return self.tables.num_available

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, idle or in use."""
        return self.prefixes.tree.num_nodes

    @property
    def num_copies(self) -> int:
        return self.stats.copied_blocks

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is shared."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return self.tables.blocks_for(num_tokens)

    # --- tables: what the verbs and the scheduler do ---

    def new_table(self, request_id: str = "", namespace: Namespace = SHARED, private: bool = False) -> BlockTable:
        """An empty table. A private one finds what its own request computed, and nothing of others'."""
        alone = private or not self.caching
        return BlockTable(namespace.private_to(request_id) if alone else namespace, request_id)

    def allocate(self, table: BlockTable, start: int, stop: int) -> tuple[BlockCopy, ...] | None:
        return self.tables.allocate(table, start, stop)

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        return self.tables.fork(table, num_tokens)

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        self.tables.truncate(table, num_tokens)

    def free(self, table: BlockTable) -> None:
        self.tables.free(table)

    def remember_end(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """A sequence ends with these tokens. Before its table is freed; for explanations alone."""
        if self.caching:
            self.explanations.note_end(table, token_ids)

    # --- the prefix cache: what the scheduler does and asks ---

    def match(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, limit: int) -> int:
        return self.prefixes.match(table, token_ids, num_computed, limit)

    def give_part_back(self, table: BlockTable, num_computed: int) -> int:
        return self.prefixes.give_part_back(table, num_computed)

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        self.prefixes.commit(table, token_ids, num_computed)

    def pending_block(self, table: BlockTable, token_ids: Sequence[int], target: int) -> Hashable:
        return self.prefixes.pending_block(table, token_ids, target)

    def cached_prefix(
        self, table: BlockTable, token_ids: Sequence[int], known: CachedPrefix | None
    ) -> CachedPrefix | None:
        return self.prefixes.cached_prefix(table, token_ids, known)

    def blocks_needed(self, pending: Sequence[PendingKV]) -> int:
        """Available blocks that all of this takes, when nothing of it is cached. Sequences of which nothing is computed
        share what their tokens have in common."""
        started = sum(self.tables.blocks_missing(one.table, one.start, one.stop) for one in pending if one.table)
        others = [one for one in pending if not one.table]
        if len(others) == 1:
            return started + self.blocks_for(others[0].stop)
        size = self.block_size
        prefixes: set[int] = set()
        partial = 0
        for one in others:
            prefix = 0
            for start in range(0, one.stop - size + 1, size):
                prefix = hash((prefix, *one.token_ids[start : start + size]))
                prefixes.add(prefix)
            partial += one.stop % size > 0
        return started + len(prefixes) + partial

    def reset(self) -> int:
        """Forget everything cached, in the tier as well; blocks in use stay with their tables. Returns how many blocks
        of memory were forgotten."""
        return self.prefixes.reset()

    def end_request(self, request_id: str, namespace: Namespace = SHARED) -> None:
        """The request has ended and has no tables left. What it had cached for itself alone goes over to the others, or
        home if nothing is shared."""
        private = namespace.private_to(request_id)
        if self.caching:
            self.prefixes.merge(private)
        else:
            self.prefixes.forget(private)

    def close(self) -> None:
        """No request is left: the tier keeps what is cached, as far as it has room, the last used above all."""
        self.prefixes.close()

    # --- the tier ---

    def learn_speed(self, seconds_per_token: float) -> None:
        """How long a prompt's token took to compute: what a kept block has to be faster than."""
        block, known = seconds_per_token * self.block_size, self.prefixes.compute_seconds
        self.prefixes.compute_seconds = block if known is None else 0.8 * known + 0.2 * block

    def awaits_load(self, table: BlockTable) -> bool:
        """Whether the block that comes next is on its way from the tier, as `match` found last."""
        return table.awaits in self.prefixes.loads

    @property
    def num_loading(self) -> int:
        """Blocks on their way from the tier."""
        return len(self.prefixes.loads)

    def wait_for_loads(self, seconds: float) -> None:
        """Until one more block has come from the tier, at most so long."""
        self.prefixes.loads.wait(seconds)

    def take_loads(self) -> tuple[BlockLoad, ...]:
        return self.prefixes.take_loads()

    def settle_loads(self, written: Collection[int]) -> None:
        self.prefixes.settle_loads(written)

    def forget_loads(self) -> None:
        """In a forked child: nobody reads for it."""
        self.prefixes.loads.forget()

    # --- explanations ---

    def _note_eviction(self, node: Node, reason: str) -> None:
        evicted = self.explanations.note_eviction(node, reason)
        if self.on_evict is not None:
            self.on_evict(evicted)

    def explain(self, token_ids: Sequence[int], namespace: Namespace = SHARED) -> CacheExplanation:
        """For a prompt that a request would begin with now. Takes and changes nothing."""
        if not self.caching:
            return CacheExplanation(len(token_ids), 0, self.block_size, "Prefix caching is off.")
        return self.explanations.explain(self.prefixes, token_ids, namespace)

    def order(self, prefix: Sequence[int], parts: Sequence[Sequence[int]], namespace: Namespace = SHARED) -> list[int]:
        """Numbers of all parts, in the order in which most of a prompt of the prefix and them is cached now. Takes and
        changes nothing."""
        if not self.caching:
            return list(range(len(parts)))
        from octavo.kv_cache.ordering import CacheOrder

        return CacheOrder(self.prefixes, namespace, self.block_size).best(prefix, parts)

    # --- the conservation law ---

    def check(self, tables: Iterable[BlockTable]) -> None:
        """The conservation law, over all live tables: raises AssertionError when a block is lost or counted wrongly."""
        pool, tree = self.tables.pool, self.prefixes.tree
        in_tables: Counter[int] = Counter(load.block for load in self.prefixes.loads.placed if load.block is not None)
        for table in tables:
            in_tables.update(table)
            if len(set(table)) != len(table):
                raise AssertionError(f"a block stands twice in one table: {table}")
            _check_indexed(table)
        idle = 0
        for block in range(self.num_blocks):
            node = tree.node_of(block)
            references = in_tables[block] + (node is not None)
            if references != pool.ref_count(block):
                count = pool.ref_count(block)
                raise AssertionError(f"block {block}: {references} references found, reference count {count}")
            if node is not None and node.idle != (not in_tables[block]):
                raise AssertionError(f"block {block}: idle is {node.idle}, and it is in {in_tables[block]} tables")
            idle += node is not None and not in_tables[block]
        if pool.num_free + idle + len(in_tables) != self.num_blocks or idle != tree.num_idle:
            counts = f"{pool.num_free} free + {idle} idle ({tree.num_idle}) + {len(in_tables)} in use"
            raise AssertionError(f"{counts} != {self.num_blocks} blocks")


def _check_indexed(table: BlockTable) -> None:
    node = table.node
    if node is None or (node.parent is None and node.depth):
        return  # nothing indexed, or indexed in a tree that was reset
    blocks = [above.block for above in node.path()][::-1]
    if blocks != table[: len(blocks)]:
        raise AssertionError(f"the table {table} is not on its path of the tree, {blocks}")
