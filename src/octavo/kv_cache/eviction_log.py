"""What was cached once and is no longer, and why: so that a miss can be explained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from octavo.kv_cache.radix_tree import Key, Node


class Evicted(NamedTuple):
    """One block that left the cache."""

    depth: int  # it held the block number depth - 1 of its prefix
    tokens: Key
    request_id: str  # whose computation it was
    reason: str  # "capacity" or "reset"
    time: float  # seconds, when it went
    age: float  # seconds it had been cached


class EvictionLog:
    """The last `capacity` evictions, found by the tokens they held.

    An entry is found by a hash of its whole prefix; the tokens of its own block are compared. That is enough for an
    explanation and nothing is decided by it.
    """

    def __init__(self, capacity: int = 16_384) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, Evicted] = OrderedDict()

    def add(self, node: Node, reason: str, now: float) -> Evicted:
        entry = Evicted(node.depth, node.key, node.request_id, reason, now, now - node.since)
        self._entries[node.prefix_hash] = entry
        self._entries.move_to_end(node.prefix_hash)
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return entry

    def find(self, namespace: Hashable, token_ids: Sequence[int], block_size: int, depth: int) -> Evicted | None:
        """The eviction of block number depth - 1 of these tokens, if it is remembered."""
        prefix_hash = hash(namespace)
        key: Key = ()
        for block in range(depth):
            key = tuple(token_ids[block * block_size : (block + 1) * block_size])
            prefix_hash = hash((prefix_hash, key))
        entry = self._entries.get(prefix_hash)
        return entry if entry is not None and entry.tokens == key else None

    def __len__(self) -> int:
        return len(self._entries)
