"""The prefix cache against a plain dictionary, and what it promises one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from octavo.core.namespace import Namespace
from octavo.kv_cache import BlockTable, KVCacheManager
from octavo.kv_cache.prefix_cache import common

SIZE = 2
NUM_BLOCKS = 12
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
Prefix = tuple[int, ...]


class Held:
    """A table with the tokens it stands for; the first `computed` of them have KV."""

    def __init__(self, table: BlockTable, token_ids: list[int], salt: str) -> None:
        self.table, self.token_ids, self.salt, self.computed = table, token_ids, salt, 0
        self.out = False  # it was in the tree when that was reset: it stays out from then on


def cached_prefixes(kv: KVCacheManager) -> dict[tuple[object, Prefix], int]:
    """Every prefix in the tree, with its namespace, and the block that ends it."""
    found = {}
    for node in kv.prefixes.tree.nodes():
        path = list(node.path())[::-1]
        namespace = path[0].parent.namespace  # type: ignore[union-attr] # the first one's parent is a root
        found[namespace, tuple(token for step in path for token in step.key)] = node.block
    return found


class PrefixCache(RuleBasedStateMachine):
    """Random requests over a pool too small for them; a dictionary says what must be cached and what may be."""

    tables: Bundle[Held] = Bundle("tables")
    evictions = hits = forks = 0

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(NUM_BLOCKS, SIZE)
        self.live: list[Held] = []
        self.known: dict[tuple[object, Prefix], int] = {}
        self.allowed_evictions = 0

    def in_use(self) -> set[int]:
        return {block for held in self.live for block in held.table}

    def sync(self, free_before: int, taken: int) -> None:
        """After something that may evict: only idle leaves went, and only as many as free blocks were missing."""
        now = cached_prefixes(self.kv)
        gone = self.known.keys() - now.keys()
        assert len(gone) == max(taken - free_before, 0), "more or fewer evictions than were needed"
        assert not {self.known[prefix] for prefix in gone} & self.before_use, "a block in use was evicted"
        type(self).evictions += len(gone)
        for prefix in gone:
            del self.known[prefix]
        assert now == self.known

    @rule(target=tables, token_ids=TOKENS, salt=st.sampled_from("ab"))
    def begin(self, token_ids: list[int], salt: str) -> Held:
        held = Held(self.kv.new_table("r", Namespace(salt)), token_ids, salt)
        self.live.append(held)
        return held

    @rule(held=tables)
    def match(self, held: Held) -> None:
        namespace = Namespace(held.salt)
        before = held.computed
        limit = len(held.token_ids) - 1
        longest = before
        if not held.out:
            stop = (before // SIZE + 1) * SIZE
            while stop <= len(held.token_ids) and (namespace, tuple(held.token_ids[:stop])) in self.known:
                longest = max(longest, min(stop, limit))
                stop += SIZE
            if longest % SIZE == 0:  # a block that goes on differently
                there, rest = tuple(held.token_ids[:longest]), held.token_ids[longest:limit]
                longest += max(
                    (common(key[longest:], rest) for of, key in self.known if self.follows(of, key, namespace, there)),
                    default=0,
                )
        held.computed = self.kv.match(held.table, held.token_ids, before, limit)
        assert held.computed == longest
        type(self).hits += held.computed > before

    @staticmethod
    def follows(of: Namespace, prefix: tuple[int, ...], namespace: Namespace, there: tuple[int, ...]) -> bool:
        return of == namespace and len(prefix) == len(there) + SIZE and prefix[: len(there)] == there

    @rule(held=tables, count=st.integers(1, 6))
    def compute(self, held: Held, count: int) -> None:
        stop = min(held.computed + count, len(held.token_ids))
        if stop == held.computed:
            return
        self.before_use = self.in_use()
        free, taken = self.kv.tables.pool.num_free, self.kv.tables.blocks_missing(held.table, held.computed, stop)
        if self.kv.allocate(held.table, held.computed, stop) is None:
            assert taken > self.kv.num_available
            return
        self.sync(free, taken)
        held.computed = stop
        self.kv.commit(held.table, held.token_ids, stop)
        for end in range(SIZE, stop + 1, SIZE):
            prefix = (Namespace(held.salt), tuple(held.token_ids[:end]))
            if not held.out:
                self.known.setdefault(prefix, held.table[end // SIZE - 1])
        assert cached_prefixes(self.kv) == self.known

    @rule(target=tables, held=tables, at=st.integers(0, 14), tail=TOKENS)
    def fork(self, held: Held, at: int, tail: list[int]) -> Held:
        at = min(at, held.computed)
        child = Held(self.kv.fork(held.table, at), held.token_ids[:at] + tail, held.salt)
        child.computed, child.out = at, held.out
        self.live.append(child)
        type(self).forks += at > 0
        return child

    @rule(held=tables, at=st.integers(0, 14), tail=TOKENS)
    def truncate(self, held: Held, at: int, tail: list[int]) -> None:
        at = min(at, held.computed)
        self.kv.truncate(held.table, at)
        held.computed = at
        held.token_ids = held.token_ids[:at] + tail

    @rule(held=consumes(tables))
    def end(self, held: Held) -> None:
        self.kv.free(held.table)
        self.live.remove(held)

    @rule(really=st.integers(0, 9))
    def reset(self, really: int) -> None:
        if really:
            return  # seldom
        assert self.kv.reset() == len(self.known)
        self.known.clear()
        for held in self.live:
            held.out = held.out or held.table.num_indexed > 0

    @invariant()
    def law(self) -> None:
        self.kv.check([held.table for held in self.live])
        for (namespace, prefix), _ in self.known.items():
            assert len(prefix) == SIZE or (namespace, prefix[:-SIZE]) in self.known, "a block without the one before it"


PrefixCache.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestPrefixCache = PrefixCache.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_the_same_at_random(seed: int) -> None:
    """5,000 operations under pressure, which hypothesis, looking for short examples, seldom comes to."""
    rng = random.Random(seed)
    PrefixCache.evictions = PrefixCache.hits = PrefixCache.forks = 0
    machine = PrefixCache()

    def tokens() -> list[int]:
        return [rng.choice((0, 0, 0, 1)) for _ in range(rng.randint(1, 14))]

    for _ in range(5_000):
        action, held = rng.random(), rng.choice(machine.live) if machine.live else None
        if held is None or (action < 0.15 and len(machine.live) < 6):
            machine.begin(tokens(), rng.choice("ab"))
        elif action < 0.3:
            machine.match(held)
        elif action < 0.6:
            machine.compute(held, rng.randint(1, 6))
        elif action < 0.7 and len(machine.live) < 6:
            machine.fork(held, rng.randint(0, 14), tokens())
        elif action < 0.8:
            machine.truncate(held, rng.randint(0, 14), tokens())
        elif action < 0.999:
            machine.end(held)
        else:
            machine.reset(0)
        machine.law()
    assert min(PrefixCache.evictions, PrefixCache.hits, PrefixCache.forks) > 100


# --- one by one ---


def computed(kv: KVCacheManager, token_ids: list[int], **settings: object) -> BlockTable:
    """A table whose blocks are computed and in the tree."""
    table = kv.new_table(**settings)  # type: ignore[arg-type]
    have = kv.match(table, token_ids, 0, len(token_ids) - 1)
    assert kv.allocate(table, have, len(token_ids)) is not None
    kv.commit(table, token_ids, len(token_ids))
    return table


def test_a_hit_ends_where_tokens_differ_and_leaves_one_token() -> None:
    kv = KVCacheManager(16, 4)
    kv.free(computed(kv, list(range(10))))
    for length, hit in ((10, 8), (9, 8), (8, 7), (7, 6), (4, 3), (3, 2), (1, 0)):
        table = kv.new_table()
        assert kv.match(table, list(range(length)), 0, length - 1) == hit
        kv.check([table])
        assert kv.allocate(table, hit, length) is not None, "what follows goes into a copy"
        kv.check([table])
        kv.free(table)
    other = kv.new_table()
    assert kv.match(other, [0, 1, 2, 3, 4, 5, 99, 7, 8], 0, 8) == 6
    (copy,) = kv.allocate(other, 6, 9) or ()
    assert copy.target == other[1] and copy.source != other[1]
    kv.commit(other, [0, 1, 2, 3, 4, 5, 99, 7, 8], 9)
    kv.check([other])
    table = kv.new_table()
    assert kv.match(table, [0, 1, 2, 3, 4, 5, 99, 8, 8], 0, 8) == 7, "of several, the one that goes furthest"
    assert kv.match(table, [0, 1, 2, 3, 4, 5, 99, 8, 8], 7, 8) == 7
    kv.check([other, table])


def test_least_recently_used_first_and_tails_before_heads() -> None:
    kv = KVCacheManager(6, 4)
    gone: list[tuple[int, str]] = []
    kv.on_evict = lambda evicted: gone.append((evicted.depth, evicted.request_id))
    for name in ("old", "new"):
        kv.free(computed(kv, [ord(name[0])] * 8, request_id=name))
    kv.free(computed(kv, [ord("o")] * 8, request_id="again"))  # uses the blocks of "old"
    table = kv.new_table()
    assert kv.allocate(table, 0, 4 * 5) is not None
    assert gone == [(2, "new"), (1, "new"), (2, "old")]
    assert [evicted.reason for evicted in kv.explanations.evictions._entries.values()] == ["capacity"] * 3


def test_what_is_in_use_is_never_evicted() -> None:
    kv = KVCacheManager(4, 4)
    held = computed(kv, list(range(12)))
    other = kv.new_table()
    assert kv.num_available == 1 and kv.allocate(other, 0, 5) is None and kv.allocate(other, 0, 4) is not None
    kv.check([held, other])


def test_two_that_computed_the_same_hold_one() -> None:
    """Computed at the same time, the second one's block goes home when it is found in the tree."""
    kv = KVCacheManager(8, 4)
    tables = [kv.new_table(), kv.new_table()]
    for table in tables:
        assert kv.allocate(table, 0, 8) is not None
    assert kv.num_available == 4
    for table in tables:
        kv.commit(table, list(range(8)), 8)
    assert tables[0] == tables[1] and kv.num_available == 6
    kv.check(tables)


def test_what_was_begun_before_a_reset_stays_out() -> None:
    kv = KVCacheManager(8, 4)
    table = computed(kv, list(range(8)))
    assert kv.reset() == 2
    assert kv.allocate(table, 8, 12) is not None
    kv.commit(table, list(range(12)), 12)
    assert kv.num_cached == 0
    kv.check([table])
    kv.free(table)
    assert kv.num_available == 8
    kv.free(computed(kv, list(range(8))))
    assert kv.num_cached == 2


def test_without_caching_a_request_keeps_a_tree_of_its_own() -> None:
    kv = KVCacheManager(8, 4, caching=False)
    kv.free(computed(kv, list(range(8)), request_id="a"))
    other, own = kv.new_table("b"), kv.new_table("a")
    assert kv.match(other, list(range(8)), 0, 7) == 0
    assert kv.match(own, list(range(8)), 0, 7) == 7, "after a preemption"
    kv.free(own)
    kv.end_request("a")
    assert kv.num_cached == 0 and kv.num_available == 8
    kv.check([])


@pytest.fixture
def roots() -> Iterator[KVCacheManager]:
    yield KVCacheManager(4, 4)


def test_namespaces_leave_nothing_behind(roots: KVCacheManager) -> None:
    """A salt for each user must not grow a table of salts."""
    for user in range(100):
        roots.free(computed(roots, list(range(8)), namespace=Namespace(f"user {user}")))
        roots.match(roots.new_table(namespace=Namespace(f"reader {user}")), list(range(8)), 0, 7)
    assert len(roots.prefixes.tree._roots) <= 2 and len(roots.prefixes.tree._idle_leaves) <= 2 * 4 + 64
