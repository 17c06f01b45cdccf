"""Running out of blocks: everybody ends, with the same tokens as alone, and nothing is lost."""

from __future__ import annotations

import pytest

from octavo.core.events import EventKind, Reason
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
