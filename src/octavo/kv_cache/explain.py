"""Why a prompt hits the prefix cache as far as it does, and no further."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.outputs import CacheExplanation
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.radix_tree import Node


def explain(kv: KVCacheManager, token_ids: Sequence[int], salt: str | None, now: float) -> CacheExplanation:
    """For a prompt that a request would begin with now. Takes and changes nothing."""
    size = kv.block_size
    if not kv.caching:
        return CacheExplanation(len(token_ids), 0, size, "Prefix caching is off.")
    path = kv.find(token_ids, salt)
    cached = len(path) * size  # whole blocks
    hit = min(cached, max(len(token_ids) - 1, 0))
    last = path[-1].request_id if path else None
    if cached + size > len(token_ids):
        left = len(token_ids) - cached
        reason = (
            "Everything is cached; the last token is computed all the same."
            if left == 0
            else f"All whole blocks are cached; the last {left} tokens do not fill one."
        )
        return CacheExplanation(len(token_ids), hit, size, reason, earlier_request_id=last)
    if (evicted := kv.find_evicted(token_ids, salt, len(path) + 1)) is not None:
        ago = now - evicted.time
        reason = (
            f"The block of positions {cached} to {cached + size - 1} was computed by {evicted.request_id} and evicted "
            f"{ago:.1f} s ago ({evicted.reason}), after {evicted.age:.1f} s."
        )
        return CacheExplanation(
            len(token_ids),
            hit,
            size,
            reason,
            earlier_request_id=evicted.request_id,
            evicted_reason=evicted.reason,
            evicted_seconds_ago=ago,
        )
    return _difference(kv.children(path, salt), token_ids, hit, cached, size, last)


def _difference(
    children: Sequence[Node], token_ids: Sequence[int], hit: int, cached: int, size: int, last: str | None
) -> CacheExplanation:
    """The request that went on after the cached prefix and shares most of the next block."""
    block = tuple(token_ids[cached : cached + size])

    def common(node: Node) -> int:
        return next(i for i, (a, b) in enumerate(zip(node.key, block, strict=True)) if a != b)

    if not children:
        reason = (
            f"No earlier request went on past position {cached}; the last was {last}."
            if last is not None
            else "Nothing that begins like this is cached."
        )
        return CacheExplanation(len(token_ids), hit, size, reason, earlier_request_id=last)
    closest = max(children, key=common)
    at = common(closest)
    reason = (
        f"Token {cached + at} is {block[at]}; {closest.request_id} had {closest.key[at]} there, and blocks of {size} "
        "tokens are shared whole."
    )
    return CacheExplanation(
        len(token_ids), hit, size, reason, cached + at, block[at], closest.key[at], closest.request_id
    )
