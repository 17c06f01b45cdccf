"""Why a prompt hits the prefix cache as far as it does, and no further; and what has to be remembered to say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from octavo.core.namespace import Namespace
from octavo.core.outputs import CacheExplanation
from octavo.kv_cache.block_tables import BlockTable
from octavo.kv_cache.eviction_log import EndingLog, Evicted, EvictionLog, prefix_hash
from octavo.kv_cache.prefix_cache import PrefixCache, common, extended
from octavo.kv_cache.radix_tree import Key, Node


class Explanations:
    """Looks at a prefix cache and takes nothing from it. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float], block_size: int) -> None:
        self.evictions = EvictionLog()
        self.endings = EndingLog()
        self._clock = clock
        self._size = block_size

    def note_eviction(self, node: Node, reason: str) -> Evicted:
        return self.evictions.add(node, reason, self._clock())

    def note_end(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """A sequence ends with these tokens. Before its table is freed."""
        first = table.num_indexed * self._size
        tokens = tuple(token_ids[first : first + self._size])
        if tokens and table.indexes and not table.namespace.is_private:
            before = hash(table.namespace) if table.node is None else table.node.prefix_hash
            self.endings.add(before, tokens, table.request_id)

    def explain(self, cache: PrefixCache, token_ids: Sequence[int], namespace: Namespace) -> CacheExplanation:
        """For a prompt that a request would begin with now."""
        size = self._size
        root = cache.tree.root(namespace)
        path = list(cache.tree.walk(root, token_ids, size))
        kept = self._num_kept(cache, path, token_ids, namespace)
        found = len(path) + kept  # whole blocks
        last = path[-1] if path else root
        closest, part = cache.closest(last, token_ids[found * size : (found + 1) * size])
        if kept:  # what is in memory ends before that
            part = 0
        elif closest is None and path:
            closest = path[-1]
        told = CacheExplanation(
            len(token_ids),
            min(len(path) * size + part, max(len(token_ids) - 1, 0)),
            size,
            "",
            earlier_request_id=None if kept or closest is None else closest.request_id,
            num_kept_tokens=kept * size,
        )
        followers: list[tuple[Key, str]] = []  # what earlier requests had there: a whole block, or their end
        if last is not None and not kept:
            followers += [(node.key, node.request_id) for node in last.children.values()]
        prefix = prefix_hash(namespace, token_ids, size, found)
        followers += [(ending.tokens, ending.request_id) for ending in self.endings.after(prefix)]
        return self._why_no_further(token_ids, namespace, found * size, told, followers)

    def _num_kept(self, cache: PrefixCache, path: list[Node], token_ids: Sequence[int], namespace: Namespace) -> int:
        """Blocks behind a path that the tier has. Loads nothing."""
        if cache.tier is None:
            return 0
        digest = cache.digest_of(namespace, path[-1] if path else None)
        number = len(path)
        while (number + 1) * self._size < len(token_ids):  # the last token is computed
            digest = extended(digest, tuple(token_ids[number * self._size : (number + 1) * self._size]))
            if not cache.tier.has(digest):
                break
            number += 1
        return number - len(path)

    def _why_no_further(
        self,
        token_ids: Sequence[int],
        namespace: Namespace,
        start: int,
        told: CacheExplanation,
        followers: list[tuple[Key, str]],
    ) -> CacheExplanation:
        """`told` with the reason why the block from position `start` on is not cached."""
        size = self._size
        block = tuple(token_ids[start : start + size])
        if not block or told.num_cached_tokens == max(len(token_ids) - 1, 1):
            return replace(told, reason="Everything is cached; the last token is computed all the same.")
        evicted = self.evictions.find(namespace, token_ids, size, start // size + 1)
        if len(block) == size and evicted is not None:
            ago = self._clock() - evicted.time
            reason = (
                f"The block of positions {start} to {start + size - 1} was computed by {evicted.request_id} and "
                f"evicted {ago:.1f} s ago ({evicted.reason}), after {evicted.age:.1f} s."
            )
            return replace(
                told,
                reason=reason,
                earlier_request_id=evicted.request_id,
                evicted_reason=evicted.reason,
                evicted_seconds_ago=ago,
            )
        closest, request_id = max(followers, key=lambda one: common(one[0], block), default=((), None))
        at = common(closest, block)
        if at < min(len(closest), len(block)):
            reason = f"Token {start + at} is {block[at]}; {request_id} had {closest[at]} there"
            if told.num_cached_tokens < start + at:
                reason += f", in a block of {size} tokens that it did not fill: only full ones are cached"
            reason += "."
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
            reason = f"All full blocks are cached; the {several} not fill one."
            if start == 0:
                reason = f"The prompt does not fill a block of {size} tokens, and only full blocks are cached."
            return replace(told, reason=reason)
        if request_id is not None:
            reason = f"No earlier request went on past position {start + at}; {request_id} ended there."
            return replace(told, reason=reason, earlier_request_id=request_id)
        last = told.earlier_request_id
        if last is not None:
            return replace(told, reason=f"No earlier request went on past position {start}; the last was {last}.")
        if start:
            return replace(told, reason=f"No earlier request went on past position {start}.")
        return replace(told, reason="Nothing that begins like this is cached.")
