"""The order of parts of a prompt of which most is cached already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octavo.core.namespace import Namespace
from octavo.kv_cache.prefix_cache import PrefixCache, extended
from octavo.kv_cache.radix_tree import Key, Node

# With all of it cached in any order there would be no end. So many steps over a part, and looks at where one could go:
_MAX_STEPS, _MAX_LOOKS = 4096, 1 << 16


class _Place(NamedTuple):
    """How far a prompt is cached, in whole blocks, and the tokens behind them."""

    node: Node | None  # None: what comes here is in the tier, or nothing is cached
    digest: bytes | None  # of the whole blocks; None: not needed yet
    num_tokens: int  # of all that is before here
    rest: Key  # the last of these, which fill no block


class CacheOrder:
    """Looks at a prefix cache, once, and takes nothing from it. `block_size` is in tokens."""

    def __init__(self, cache: PrefixCache, namespace: Namespace, block_size: int) -> None:
        self._cache = cache
        self._namespace = namespace
        self._size = block_size
        self._num_looks = self._num_steps = 0
        self._most = 0  # tokens there are

    def best(self, prefix: Sequence[int], parts: Sequence[Sequence[int]]) -> list[int]:
        """All numbers of parts, in the order in which most of ``prefix + parts`` is cached. What is not cached, and of
        orders that are equal, comes in the order given."""
        root = self._cache.tree.root(self._namespace)
        digest = None if root is not None else self._cache.digest_of(self._namespace, None)
        start, num_cached = self._step(_Place(root, digest, 0, ()), tuple(prefix))
        order: list[int] = []
        self._most = len(prefix) + sum(map(len, parts))
        if start is not None:
            _, order = self._search(start, parts, list(range(len(parts))), num_cached)
        return order + [number for number in range(len(parts)) if number not in order]

    def _search(
        self, place: _Place, parts: Sequence[Sequence[int]], left: list[int], num_cached: int
    ) -> tuple[int, list[int]]:
        """Tokens that are cached of the best order of what is left, and the parts that this takes."""
        best: tuple[int, list[int]] = num_cached, []
        for number in left:
            if self._num_steps >= _MAX_STEPS or best[0] == self._most:
                break
            self._num_looks += 1
            # Most parts lead nowhere, and what they begin alike, less than a block, is looked at while there is time.
            if self._num_looks > _MAX_STEPS and not self._leads_on(place, parts[number]):
                if self._num_looks > _MAX_LOOKS:
                    break
                continue
            self._num_steps += 1
            there, found = self._step(place, tuple(parts[number]))
            order: list[int] = []
            if there is not None:
                found, order = self._search(there, parts, [one for one in left if one != number], found)
            if found > best[0]:
                best = found, [number, *order]
        return best

    def _leads_on(self, place: _Place, token_ids: Sequence[int]) -> bool:
        """Whether the first block that these tokens fill is in memory."""
        ahead = (*place.rest, *token_ids[: self._size - len(place.rest)])
        return len(ahead) < self._size or (place.node is not None and ahead in place.node.children)

    def _step(self, place: _Place, token_ids: Key) -> tuple[_Place | None, int]:
        """Where one is behind these tokens, None if not all of them are cached; and how many are, with those before."""
        node, digest, _, rest = place
        ahead = rest + token_ids
        done = place.num_tokens - len(rest)
        while len(ahead) >= self._size:
            key = ahead[: self._size]
            child = None if node is None else node.children.get(key)
            if child is not None:
                node, digest = child, None
            else:
                if self._cache.tier is None:
                    break
                if digest is None:
                    digest = self._cache.digest_of(self._namespace, node)
                below = extended(digest, key)
                if not self._cache.tier.has(below):
                    break
                node, digest = None, below
            done += self._size
            ahead = ahead[self._size :]
        _, part = self._cache.closest(node, ahead[: self._size])
        # What fills no block is not in the tier by itself, but may be the beginning of a block that is.
        may_be_in_tier = self._cache.tier is not None and len(ahead) < self._size
        if part < len(ahead) and not may_be_in_tier:
            return None, done + part
        return _Place(node, digest, done + len(ahead), ahead), done + part
