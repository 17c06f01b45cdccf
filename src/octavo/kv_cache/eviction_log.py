"""What was cached once and is no longer, and why, and how earlier requests ended: so that a miss can be explained."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from octavo.core.namespace import Namespace
from octavo.kv_cache.radix_tree import Key, Node


class Evicted(NamedTuple):
    """One block that left the cache."""

    depth: int  # it held the block number depth - 1 of its prefix
    tokens: Key
    request_id: str  # whose computation it was
    reason: str  # "capacity" or "reset"
    time: float  # seconds, when it went
    age: float  # seconds it had been cached


class Ending(NamedTuple):
    """What a request had behind its last cached block when it ended."""

    prefix: int  # hash of what came before
    tokens: Key  # at most one block
    request_id: str


class EndingLog:
    """How the last `capacity` sequences ended: tokens that fill no block are in no tree."""

    def __init__(self, capacity: int = 4096) -> None:
        self._endings: deque[Ending] = deque(maxlen=capacity)

    def add(self, prefix: int, tokens: Key, request_id: str) -> None:
        self._endings.append(Ending(prefix, tokens, request_id))

    def after(self, prefix: int) -> Iterator[Ending]:
        """Those behind this prefix, the last first. Takes time for each that is kept."""
        return (ending for ending in reversed(self._endings) if ending.prefix == prefix)


def prefix_hash(namespace: Namespace, token_ids: Sequence[int], block_size: int, num_blocks: int) -> int:
    """Of the first blocks of these tokens, as `Node.prefix_hash` has it."""
    found = hash(namespace)
    for block in range(num_blocks):
        found = hash((found, tuple(token_ids[block * block_size : (block + 1) * block_size])))
    return found


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

    def find(self, namespace: Namespace, token_ids: Sequence[int], block_size: int, depth: int) -> Evicted | None:
        """The eviction of block number depth - 1 of these tokens, if it is remembered."""
        entry = self._entries.get(prefix_hash(namespace, token_ids, block_size, depth))
        key = tuple(token_ids[(depth - 1) * block_size : depth * block_size])
        return entry if entry is not None and entry.tokens == key else None

    def __len__(self) -> int:
        return len(self._entries)
