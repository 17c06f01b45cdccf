"""What goes into the prefix cache: exact KV, for those of the same namespace."""

from __future__ import annotations

import pytest

from octavo.core.namespace import SHARED, Namespace
from octavo.kv_cache import KVCacheManager
from tests.engine.fake import Harness, expected


def test_only_exact_kv_is_cached() -> None:
    """Guards against approximate KV that others would take for exact."""
    harness = Harness()
    harness.add("r", list(range(20)), max_tokens=8)
    (sequence,) = harness.sequences()
    sequence.exact_until = 10
    harness.run()
    depths = sorted(node.depth for node in harness.kv.prefixes.tree.nodes())
    assert depths == [1, 2], "two blocks of 4 lie before position 10"
    harness.add("other", list(range(20)), max_tokens=8)
    harness.run()
    assert harness.outputs["other"].num_cached_tokens == 8
    assert harness.tokens("other") == expected(list(range(20)), 8)


@pytest.mark.parametrize(
    "other", [Namespace(salt="a"), Namespace(adapter="a"), Namespace(document="a"), SHARED.private_to("a")]
)
def test_namespaces_share_nothing(other: Namespace) -> None:
    kv = KVCacheManager(16, 4)
    tokens = list(range(8))
    table = kv.new_table("r", other)
    assert kv.allocate(table, 0, 8) == ()
    kv.commit(table, tokens, 8)
    assert kv.match(kv.new_table("s"), tokens, 0, 7) == 0
    assert kv.match(kv.new_table("s", other._replace(salt="b")), tokens, 0, 7) == 0
    again = kv.new_table("s", other)
    assert kv.match(again, tokens, 0, 7) == 7
    assert kv.explain(tokens).num_cached_tokens == 0 and kv.explain(tokens, other).num_cached_tokens == 7
    kv.check([table, again])


@pytest.mark.parametrize("length", [13, 14, 15])
@pytest.mark.parametrize("same", range(1, 13))
def test_part_of_a_block_in_a_pool_that_just_fits(length: int, same: int) -> None:
    """Guards against a copy for which there is no block: the cached part is computed anew instead."""
    harness = Harness(num_blocks=4, block_size=4)
    harness.add("first", list(range(12)), max_tokens=4)
    harness.run()
    prompt = [*range(same), *(30 + n for n in range(length - same))]
    harness.add("second", prompt, max_tokens=16 - length)
    harness.run()
    assert harness.outputs["second"].error is None
    assert harness.tokens("second") == expected(prompt, 16 - length)


def test_a_private_one_goes_over_to_its_own_kind() -> None:
    kv = KVCacheManager(16, 4)
    namespace = Namespace(salt="a")
    table = kv.new_table("r", namespace, private=True)
    assert table.namespace.is_private and table.namespace.shared == namespace
    assert kv.allocate(table, 0, 8) == ()
    kv.commit(table, list(range(8)), 8)
    kv.free(table)
    assert kv.explain(list(range(8)), namespace).num_cached_tokens == 0
    kv.end_request("r", namespace)
    assert kv.explain(list(range(8)), namespace).num_cached_tokens == 7
    assert kv.explain(list(range(8))).num_cached_tokens == 0
