"""Blocks that come back from the tier: shared, late, damaged, refused by the executor, in pools too small for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from octavo.core.beam_params import BeamSearchParams
from octavo.core.events import EventKind, Reason
from octavo.core.request import RequestSpec
from octavo.kv_cache.tier_loads import GIVE_UP_SECONDS
from tests.engine.fake import FakeTier, Harness, expected

PROMPT = list(range(41))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.engine._WAIT_FOR_LOADS", 0.0)


def evicted(ticks: Callable[[], int], **settings: object) -> Harness:
    """PROMPT was computed, and is in the tier alone."""
    harness = Harness(**({"num_blocks": 24, "ticks": ticks} | settings))  # type: ignore[arg-type]
    harness.add("first", PROMPT, max_tokens=1)
    harness.add("other", [7] * 93, max_tokens=1)
    harness.run()
    assert harness.tier is not None and len(harness.tier.blocks) == 10 and harness.tier.loads == 0
    harness.executor.computed = 0
    return harness


@pytest.mark.parametrize("ticks", [0, 1, 7])
def test_a_prefix_is_loaded_once_for_all_who_share_it(ticks: int) -> None:
    """Four requests at once, one of them with samples: none computes what is kept, each block comes once."""
    harness = evicted(lambda: ticks)
    for name, n in (("a", 1), ("b", 3), ("c", 1), ("d", 1)):
        harness.add(name, PROMPT, max_tokens=3, n=n)
    harness.run()
    for name, n in (("a", 1), ("b", 3), ("c", 1), ("d", 1)):
        assert harness.outputs[name].num_cached_tokens == 40
        for index in range(n):
            assert harness.tokens(name, index) == expected(PROMPT, 3, index)
    assert harness.tier is not None and harness.tier.loads == harness.executor.loaded == 10
    assert harness.executor.computed == 4 + 2 * 6, "the last token of the prompt, and what was drawn"
    assert harness.kv.stats.loaded_blocks == 10 and harness.kv.num_loading == 0


def test_nobody_waits_for_anothers_loads() -> None:
    """Guards against a slow disk that stalls the engine: one request waits for its blocks, the other goes on."""
    harness = evicted(lambda: 9)
    harness.add("kept", PROMPT, max_tokens=3)
    harness.add("new", [9, 8, 7], max_tokens=7)
    for _ in range(8):
        harness.step()
    assert harness.outputs["new"].finished and "kept" not in harness.outputs
    waits = [event for event in harness.engine.events.of(EventKind.WAITING) if event.reason is Reason.LOADING]
    assert [event.request_id for event in waits] == ["kept"], "told once, not in every step"
    harness.run()
    assert harness.tokens("kept") == expected(PROMPT, 3) and harness.tokens("new") == expected([9, 8, 7], 7)


def test_a_disk_that_does_not_answer_is_given_up() -> None:
    harness = evicted(lambda: 10**9)
    harness.add("kept", PROMPT, max_tokens=3)
    for _ in range(3):
        harness.step()
    assert harness.kv.num_loading == 10 and not harness.executor.computed
    harness.now += GIVE_UP_SECONDS
    harness.tier.blocks.clear()  # type: ignore[union-attr]
    harness.run()
    assert harness.tokens("kept") == expected(PROMPT, 3) and harness.executor.computed == 43


@pytest.mark.parametrize("at", range(10))
def test_a_damaged_block_is_computed_and_what_follows_it_too(at: int) -> None:
    harness = evicted(lambda: 1)
    asked = iter(range(100))
    assert harness.tier is not None
    harness.tier.damaged = lambda: next(asked) == at
    harness.add("kept", PROMPT, max_tokens=3)
    harness.run()
    assert harness.tokens("kept") == expected(PROMPT, 3)
    assert harness.executor.loaded >= at and harness.executor.computed >= 1 + 4
    assert harness.kv.num_loading == 0


def test_loads_that_the_executor_refuses() -> None:
    """Nobody ends, no table claims them, and they are not tried again for ever; copies of the same step are done."""
    harness = evicted(lambda: 0)
    harness.executor.fail_loads = True
    harness.add("kept", PROMPT, max_tokens=3, n=2)
    harness.add("new", [9, 8, 7], max_tokens=6, n=3)
    harness.run()
    for name, prompt, count, n in (("kept", PROMPT, 3, 2), ("new", [9, 8, 7], 6, 3)):
        for index in range(n):
            assert harness.tokens(name, index) == expected(prompt, count, index)
    assert harness.executor.loaded == 0 and harness.kv.stats.loaded_blocks == 0
    assert harness.engine.events.of(EventKind.STEP_RETRIED)


def test_a_reading_that_raises_is_a_miss() -> None:
    harness = evicted(lambda: 0)

    def load(*_: object) -> Future[bytes | None]:
        future: Future[bytes | None] = Future()
        future.set_exception(OSError("the disk is gone"))
        return future

    harness.tier.load = load  # type: ignore[union-attr, method-assign]
    harness.add("kept", PROMPT, max_tokens=3)
    for _ in range(3):
        harness.step()
    harness.tier.load = lambda *_: None  # type: ignore[union-attr, method-assign, assignment]
    harness.run()
    assert harness.tokens("kept") == expected(PROMPT, 3)


def test_a_reset_forgets_what_is_kept_and_what_is_on_its_way() -> None:
    harness = evicted(lambda: 5)
    harness.add("before", PROMPT, max_tokens=3)
    harness.step()
    assert harness.kv.num_loading == 10
    harness.engine.reset_prefix_cache()
    assert harness.kv.num_loading == 0 and not harness.tier.blocks  # type: ignore[union-attr]
    harness.add("after", PROMPT, max_tokens=3)
    harness.run()
    assert harness.executor.loaded == 0
    assert harness.outputs["before"].num_cached_tokens == 0
    for name in ("before", "after"):
        assert harness.tokens(name) == expected(PROMPT, 3)


def test_an_abort_while_blocks_are_on_their_way() -> None:
    """They come into the tree all the same, for the next one."""
    for steps in range(8):
        harness = evicted(lambda: 3)
        harness.add("gone", PROMPT, max_tokens=3)
        for _ in range(steps):
            harness.step()
        harness.engine.abort("gone")
        harness.check()
        harness.add("next", PROMPT, max_tokens=3)
        harness.run()
        assert harness.tokens("next") == expected(PROMPT, 3)
        assert harness.tier is not None and harness.tier.loads == 10


def test_a_search_is_restored_from_the_tier_as_shared_as_it_was() -> None:
    """Guards against beams that each load the prefix for themselves, and then do not fit: with a tier a search must
    need no more blocks than without."""
    found = {}
    for ticks in (None, lambda: 0, lambda: 2):
        harness = Harness(num_blocks=18, max_num_batched_tokens=64, ticks=ticks)
        params = BeamSearchParams(beam_width=4, max_tokens=14)
        request = RequestSpec("search", tuple(PROMPT[:33]), params.sampling, seed=0, max_tokens=14, beams=params)
        harness.add("older", [30], max_tokens=60)
        harness.step()
        harness.engine.add_request(request)
        harness.run()
        assert harness.outputs["search"].error is None
        assert harness.outputs["search"].metrics.num_preemptions > 0
        if ticks is not None:
            assert harness.executor.loaded > 5
        found[ticks] = [output.token_ids for output in harness.outputs["search"].outputs]
    assert len(found) == 3 and len({str(one) for one in found.values()}) == 1


def test_more_loads_than_the_pool_has_room_for() -> None:
    """Two long prefixes in the tier and a pool that holds one: the later one waits, and no load evicts another's."""
    harness = Harness(num_blocks=24, ticks=lambda: 1)
    prompts = {name: [number] * 61 for number, name in enumerate("abc")}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=1)
        harness.run()
    for number, (name, prompt) in enumerate(prompts.items()):
        harness.add(name * 2, [*prompt, number], max_tokens=8)
    harness.run()
    for number, (name, prompt) in enumerate(prompts.items()):
        assert harness.tokens(name * 2) == expected([*prompt, number], 8)
        assert harness.outputs[name * 2].num_cached_tokens >= 44
    assert harness.executor.loaded >= 20


def test_deep_prefixes() -> None:
    """Guards against a recursion over the blocks of a prefix: there may be more of them than Python's stack holds."""
    harness = Harness(num_blocks=1700, block_size=1, max_num_batched_tokens=4096, ticks=lambda: 0)
    prompt = [random.Random(1).randrange(50) for _ in range(1500)]
    harness.add("deep", prompt, max_tokens=1)
    harness.add("other", [3] * 1690, max_tokens=1)
    harness.run()
    assert isinstance(harness.tier, FakeTier) and len(harness.tier.blocks) > 1400
    harness.add("again", prompt, max_tokens=2)
    harness.run()
    assert harness.tokens("again") == expected(prompt, 2) and harness.outputs["again"].num_cached_tokens == 1499
    harness.engine.close()
