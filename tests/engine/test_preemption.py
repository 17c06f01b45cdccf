"""Running out of blocks: everybody ends, with the same tokens as alone, and nothing is lost."""

from __future__ import annotations

import pytest

from octavo.coordinators.beams import BeamCoordinator
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, Reason
from octavo.core.request import RequestSpec
from tests.engine.fake import Harness, expected, logprob


def test_livelock_pool_with_room_for_one() -> None:
    """Many large requests and a pool that holds one of them: all end, the oldest is never preempted."""
    harness = Harness(num_blocks=10)  # 40 tokens
    for index in range(12):
        harness.add(f"r{index}", [index] * 20, max_tokens=19)
    harness.run(most=2_000)
    for index in range(12):
        assert harness.tokens(f"r{index}") == expected([index] * 20, 19)


def test_preempted_requests_resume_where_they_were() -> None:
    harness = Harness(num_blocks=12)
    for index in range(4):
        harness.add(f"r{index}", [index, 7, 8], max_tokens=30)
    harness.run()
    events = harness.engine.events
    assert events.of(EventKind.PREEMPTED), "nothing was preempted: the test shows nothing"
    assert "r0" not in {event.request_id for event in events.of(EventKind.PREEMPTED)}
    assert {e.request_id for e in events.of(EventKind.RESTORED)} == {
        e.request_id for e in events.of(EventKind.PREEMPTED)
    }
    for index in range(4):
        assert harness.tokens(f"r{index}") == expected([index, 7, 8], 30)
        assert harness.outputs[f"r{index}"].metrics.num_preemptions == sum(
            event.request_id == f"r{index}" for event in events.of(EventKind.PREEMPTED)
        )


@pytest.mark.parametrize("caching", [True, False])
def test_forks_are_restored_shared(caching: bool) -> None:
    """After a preemption the prompt that n samples share is computed at most once again, not n times; also where
    requests may not use one another's KV."""
    harness = Harness(num_blocks=40, max_num_batched_tokens=256, caching=caching)
    harness.add("old", [1] * 40, max_tokens=80)
    harness.step()
    harness.add("forks", [2] * 64, max_tokens=24, n=4)
    while not harness.engine.events.of(EventKind.PREEMPTED):
        harness.step()
    before = harness.executor.computed
    harness.run()
    hits = [e for e in harness.engine.events.of(EventKind.CACHE_HIT) if e.request_id == "forks"]
    assert len(hits) >= 4
    # The prompt once, what each had generated once more, and what was left to generate. Not four times the prompt.
    assert harness.executor.computed - before < 64 + 2 * (4 * 24) + 80 < 4 * 64 + 4 * 24 + 80
    for index in range(4):
        assert harness.tokens("forks", index) == expected([2] * 64, 24, index)


def test_the_oldest_alone_parks_its_own_later_samples() -> None:
    """n samples that do not fit together run a few at a time instead of failing or waiting for ever."""
    harness = Harness(num_blocks=12)  # 48 tokens
    harness.add("many", [3] * 8, max_tokens=30, n=6)
    harness.run()
    for index in range(6):
        assert harness.tokens("many", index) == expected([3] * 8, 30, index)
    assert any(e.reason is Reason.NO_BLOCKS for e in harness.engine.events.of(EventKind.EVICTED))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_more_samples_than_places(max_num_seqs: int) -> None:
    harness = Harness(max_num_seqs=max_num_seqs)
    harness.add("many", [3] * 8, max_tokens=5, n=7)
    harness.run()
    for index in range(7):
        assert harness.tokens("many", index) == expected([3] * 8, 5, index)


def test_prompt_logprobs_survive_preemption() -> None:
    harness = Harness(num_blocks=14, max_num_batched_tokens=8)
    harness.add("old", [1] * 8, max_tokens=44)
    harness.step()
    harness.add("scored", list(range(30)), max_tokens=4, prompt_logprobs=0)
    harness.run()
    scores = harness.outputs["scored"].prompt_logprobs
    assert scores is not None and len(scores) == 30 and scores[0] is None
    for position in range(1, 30):
        entry = scores[position]
        assert entry is not None and entry[position].logprob == logprob(list(range(position)), position)


def computed_by(harness: Harness, name: str) -> int:
    return sum(g.num_tokens for plan in harness.executor.plans for g in plan.grants if g.request_id == name)


@pytest.mark.parametrize("kind", ["samples", "search"])
def test_what_reads_nothing_of_others_reads_its_own(kind: str) -> None:
    """A request that skips the prefix cache is preempted and restored as one that does not: what it computed itself it
    need not compute again, and what its sequences share is computed once."""
    prompt, computed, found = [5] * 31, {}, {}
    for skip in (False, True):
        harness = Harness(num_blocks=22, max_num_seqs=6, max_num_batched_tokens=64)
        harness.add("older", [30] * 37, max_tokens=35)
        harness.step()
        if kind == "samples":
            harness.add("asked", prompt, max_tokens=14, n=4, skip_reading_prefix_cache=skip)
        else:
            params = BeamSearchParams(beam_width=4, max_tokens=14, skip_reading_prefix_cache=skip)
            request = RequestSpec("asked", tuple(prompt), params.sampling, seed=0, max_tokens=14, beams=params)
            harness.engine.add_request(request)
        harness.run()
        assert harness.outputs["asked"].error is None
        assert harness.outputs["asked"].metrics.num_preemptions + len(harness.engine.events.of(EventKind.EVICTED)) > 0
        computed[skip] = computed_by(harness, "asked")
        found[skip] = [output.token_ids for output in harness.outputs["asked"].outputs]
    assert computed[True] == computed[False] and found[True] == found[False]


def test_what_reads_nothing_of_others_leaves_its_own() -> None:
    """It computes its whole prompt, and when it has ended others find that; beside what was there already."""
    harness = Harness(num_blocks=40)
    harness.add("first", list(range(9)), max_tokens=1)
    harness.run()
    harness.add("skips", list(range(21)), max_tokens=1, skip_reading_prefix_cache=True)
    harness.run()
    assert computed_by(harness, "skips") == 21 and harness.outputs["skips"].num_cached_tokens == 0
    harness.add("after", list(range(21)), max_tokens=1)
    harness.run()
    assert computed_by(harness, "after") == 1 and harness.outputs["after"].num_cached_tokens == 20
    assert harness.kv.num_cached == 5, "no prefix stands there twice"
    harness.add("salted", list(range(21)), max_tokens=1, salt="x", skip_reading_prefix_cache=True)
    harness.run()
    harness.add("other", list(range(21)), max_tokens=1, salt="x")
    harness.run()
    assert harness.outputs["other"].num_cached_tokens == 20 and harness.kv.num_cached == 10


def test_a_stall_ends_the_request_that_does_not_fit() -> None:
    """A search that outgrows the pool has taken the blocks of everybody else: a session that is older and asks for
    little must not be the one that ends."""
    from tests.coordinators.test_branches import User, drawn

    harness = Harness(num_blocks=13, max_num_seqs=12, max_num_batched_tokens=64)
    user = User(harness)
    user.extend(user.root, [1, 2, 3, 4, 5])
    user.run(user.generate(user.root, 1))
    held = user.root.token_ids
    params = BeamSearchParams(beam_width=6, max_tokens=26)
    request = RequestSpec("search", (7,) * 5, params.sampling, seed=0, max_tokens=26, beams=params)
    search = BeamCoordinator(request)
    assert search.least_blocks(4) == 8 + 5, "so much could do if the beams had nearly all in common"
    harness.engine.add(search)
    for _ in range(8):
        harness.step()
    (output,) = user.run(user.generate(user.root, 5))
    assert output.token_ids == drawn(held, 5, (1,))
    while harness.engine.has_unfinished_requests:
        harness.step()
    assert "the request cannot go on: 6 sequences of" in (harness.outputs["search"].error or "")
    user.close()


def test_a_search_that_can_never_fit_is_refused() -> None:
    harness = Harness(num_blocks=12, max_num_seqs=12, max_num_batched_tokens=64)
    params = BeamSearchParams(beam_width=6, max_tokens=26)
    request = RequestSpec("search", (7,) * 5, params.sampling, seed=0, max_tokens=26, beams=params)
    with pytest.raises(InvalidRequestError, match="take at least 13 KV blocks of 4 tokens at their full length"):
        harness.engine.add_request(request)
    assert harness.engine.num_requests == 0 and not harness.engine.has_unfinished_requests
