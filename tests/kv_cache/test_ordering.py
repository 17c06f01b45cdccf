"""The order of parts of which most is cached, beside every order tried one by one."""

from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import pytest

from octavo.core.namespace import SHARED, Namespace
from octavo.kv_cache import KVCacheManager

SIZE = 4


def cache(manager: KVCacheManager, token_ids: list[int], namespace: Namespace = SHARED) -> None:
    """As a request that computes all of them."""
    table = manager.new_table("r", namespace)
    done = manager.match(table, token_ids, 0, len(token_ids))
    assert manager.allocate(table, done, len(token_ids)) is not None
    manager.commit(table, token_ids, len(token_ids))
    manager.free(table)


def num_cached(manager: KVCacheManager, token_ids: list[int], namespace: Namespace = SHARED) -> int:
    table = manager.new_table("asks", namespace)
    found = manager.match(table, token_ids, 0, len(token_ids))
    manager.free(table)
    return found


def joined(prefix: list[int], parts: list[list[int]], order: Any) -> list[int]:
    return [*prefix, *(token_id for number in order for token_id in parts[number])]


@pytest.mark.parametrize("seed", range(40))
def test_no_order_has_more(seed: int) -> None:
    rng = random.Random(seed)
    manager = KVCacheManager(400, SIZE)
    prefix = [rng.randrange(3) for _ in range(rng.randint(0, 6))]
    parts = [[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 5))]
    for _ in range(rng.randint(0, 6)):
        kept = rng.sample(range(len(parts)), rng.randint(1, len(parts)))
        asked = [rng.randrange(3) for _ in range(rng.randint(0, 5))]
        cache(manager, joined(prefix, parts, kept) + asked)
    order = manager.order(prefix, parts)
    assert sorted(order) == list(range(len(parts)))
    most = max(num_cached(manager, joined(prefix, parts, one)) for one in permutations(range(len(parts))))
    assert num_cached(manager, joined(prefix, parts, order)) == most


def test_nothing_cached_is_the_order_given() -> None:
    parts = [[1] * 6, [2] * 5, [3] * 4]
    assert KVCacheManager(40, SIZE).order([0], parts) == [0, 1, 2]
    assert KVCacheManager(40, SIZE, caching=False).order([0], parts) == [0, 1, 2]


def test_the_rest_comes_in_the_order_given() -> None:
    manager = KVCacheManager(40, SIZE)
    parts = [[number] * 6 for number in range(5)]
    cache(manager, [9, *parts[3], *parts[1], 7, 7, 7])
    assert manager.order([9], parts) == [3, 1, 0, 2, 4]


def test_a_namespace_sees_its_own() -> None:
    manager = KVCacheManager(40, SIZE)
    parts = [[1] * 6, [2] * 5]
    cache(manager, [9, *parts[1], *parts[0]], Namespace("salt"))
    assert manager.order([9], parts) == [0, 1]
    assert manager.order([9], parts, Namespace("salt")) == [1, 0]


def test_many_parts_all_of_them_alike() -> None:
    """Every order is cached as far: the search has an end."""
    manager = KVCacheManager(400, SIZE)
    parts = [[1] * 4 for _ in range(256)]
    cache(manager, [1] * 1200)
    assert sorted(manager.order([], parts)) == list(range(256))


class Tier:
    """Keeps what it is given, and is asked for nothing else."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    def keep(self, blocks: list[tuple[bytes, Any, int]]) -> None:
        self.digests |= {digest for digest, _, _ in blocks}

    def load(self, *_: Any) -> None:
        return None

    def has(self, digest: bytes) -> bool:
        return digest in self.digests


@pytest.mark.parametrize("length", [4, 6, 11])
def test_after_a_restart_the_order_is_that_of_the_tier(length: int) -> None:
    """Whole blocks are there, parts of one are not."""
    tier: Any = Tier()
    parts = [[number] * length for number in range(5)]
    before = KVCacheManager(40, SIZE, tier=tier)
    cache(before, [9, *parts[3], *parts[1], *parts[4], 7, 7, 7, 7])
    before.close()
    after = KVCacheManager(40, SIZE, tier=tier)
    assert after.order([9], parts) == [3, 1, 4, 0, 2]


def test_it_takes_nothing() -> None:
    manager = KVCacheManager(40, SIZE)
    parts = [[1] * 6, [2] * 5]
    cache(manager, [*parts[1], *parts[0]])
    before = manager.num_available, manager.num_cached, manager.stats.hit_tokens
    manager.order([], parts)
    assert (manager.num_available, manager.num_cached, manager.stats.hit_tokens) == before
    manager.check([])
