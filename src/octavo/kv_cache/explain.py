"""Why a prompt hits the prefix cache as far as it does, and no further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.core.outputs import CacheExplanation
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.radix_tree import Key


def explain(kv: KVCacheManager, token_ids: Sequence[int], salt: str | None, now: float) -> CacheExplanation:
    """For a prompt that a request would begin with now. Takes and changes nothing."""
    size = kv.block_size
    if not kv.caching:
        return CacheExplanation(len(token_ids), 0, size, "Prefix caching is off.")
    path = kv.find(token_ids, salt)
    kept = kv.find_kept(path, token_ids, salt)
    found = len(path) + kept  # whole blocks
    told = CacheExplanation(
        len(token_ids),
        min(len(path) * size, max(len(token_ids) - 1, 0)),
        size,
        "",
        earlier_request_id=path[-1].request_id if path and not kept else None,
        num_kept_tokens=kept * size,
    )
    followers = [(node.key, node.request_id) for node in ([] if kept else kv.children(path, salt))]
    followers += [(ending.tokens, ending.request_id) for ending in kv.find_endings(token_ids, salt, found)]
    return _why_no_further(kv, token_ids, salt, now, found * size, told, followers)


def _why_no_further(
    kv: KVCacheManager,
    token_ids: Sequence[int],
    salt: str | None,
    now: float,
    start: int,
    told: CacheExplanation,
    followers: list[tuple[Key, str]],
) -> CacheExplanation:
    """`told` with the reason why the block from position `start` on is not cached. `followers`: what earlier requests
    had there, a whole block or the end of a request."""
    size = kv.block_size
    block = tuple(token_ids[start : start + size])
    if not block:
        return replace(told, reason="Everything is cached; the last token is computed all the same.")
    if len(block) == size and (evicted := kv.find_evicted(token_ids, salt, start // size + 1)) is not None:
        ago = now - evicted.time
        reason = (
            f"The block of positions {start} to {start + size - 1} was computed by {evicted.request_id} and evicted "
            f"{ago:.1f} s ago ({evicted.reason}), after {evicted.age:.1f} s."
        )
        return replace(
            told,
            reason=reason,
            earlier_request_id=evicted.request_id,
            evicted_reason=evicted.reason,
            evicted_seconds_ago=ago,
        )
    closest, request_id = max(followers, key=lambda one: _common(one[0], block), default=((), None))
    at = _common(closest, block)
    if at < min(len(closest), len(block)):
        reason = (
            f"Token {start + at} is {block[at]}; {request_id} had {closest[at]} there, and blocks of {size} tokens are "
            "shared whole."
        )
        return replace(
            told,
            reason=reason,
            first_difference=start + at,
            token_id=block[at],
            earlier_token_id=closest[at],
            earlier_request_id=request_id,
        )
    if len(block) < size:
        several = f"last {len(block)} tokens do" if len(block) > 1 else "last token does"
        reason = f"All whole blocks are cached; the {several} not fill one."
        if start == 0:
            reason = f"The prompt does not fill a block of {size} tokens, and only whole blocks are cached."
        return replace(told, reason=reason)
    if request_id is not None:
        reason = f"No earlier request went on past position {start + at}; {request_id} ended there."
        return replace(told, reason=reason, earlier_request_id=request_id)
    last = told.earlier_request_id
    if last is not None:
        return replace(told, reason=f"No earlier request went on past position {start}; the last was {last}.")
    reason = (
        f"No earlier request went on past position {start}." if start else "Nothing that begins like this is cached."
    )
    return replace(told, reason=reason)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
