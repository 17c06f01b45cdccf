"""Schedules: what runs in which step."""

from __future__ import annotations

import pytest

from octavo.core.events import EventKind, Reason
from octavo.engine import SchedulerConfig
from tests.engine.fake import Harness, expected

# The toy workload: request -> (step of arrival, decode steps). Each prompt takes two steps; four requests fit at once.
TOY = {"A": (0, 4), "B": (1, 6), "C": (1, 3), "D": (4, 4), "E": (5, 3)}
PREFILL_STEPS = 2
PLACES = 4


def ends_when_prefill_stalls_decodes() -> int:
    """Continuous batching of engines whose steps are either prefills or decodes, the former first: their last step."""
    left = {name: [PREFILL_STEPS, decodes] for name, (_, decodes) in TOY.items()}
    running: list[str] = []
    step = 0
    while True:
        for name, (arrival, _) in TOY.items():
            if arrival <= step and name not in running and left[name][1] and len(running) < PLACES:
                running.append(name)
        phase = 0 if any(left[name][0] for name in running) else 1
        for name in running:
            if left[name][phase]:
                left[name][phase] -= 1
        running = [name for name in running if left[name][1]]
        if not any(decodes for _, decodes in left.values()):
            return step
        step += 1


def test_toy_workload() -> None:
    """Continuous batching with separate phases ends at step 12; one ragged batch of everything ends at step 10."""
    assert ends_when_prefill_stalls_decodes() == 12

    harness = Harness(max_num_seqs=PLACES, max_num_batched_tokens=PLACES, max_chunk_tokens=1)
    schedule: list[str] = []
    for step in range(12):
        for name, (arrival, decodes) in TOY.items():
            if arrival == step:
                # Two prompt tokens, a token a step: two prefill steps, and the second of them draws a token too.
                harness.add(name, [ord(name) % 50, 2], max_tokens=decodes + 1)
        harness.step()
        plan = harness.executor.plans[-1] if len(harness.executor.plans) == step + 1 else None
        schedule.append("".join(sorted(grant.request_id for grant in plan.grants)) if plan else "")
    assert schedule == ["A", "ABC", "ABC", "ABC", "ABCD", "ABCD", "BDE", "BDE", "BDE", "DE", "E", ""]
    assert not harness.engine.has_unfinished_requests


def test_ragged_step_packs_no_padding() -> None:
    """Prompts of 2048 and three of 128 tokens are 2,432 tokens in one step, not 8,192."""
    harness = Harness(num_blocks=200, block_size=16, max_num_batched_tokens=4096)
    for index, length in enumerate((2048, 128, 128, 128)):
        harness.add(str(index), [index] * length, max_tokens=1)
    harness.step()
    assert harness.executor.plans[0].num_tokens == 2432
    assert len(harness.executor.plans[0].grants) == 4


@pytest.mark.parametrize("budget", [8, 9, 16, 100])
def test_steps_keep_the_budget_and_decodes_go_on(budget: int) -> None:
    """Long prompts are chunked; whoever generates already gets a token in every step."""
    harness = Harness(num_blocks=200, max_num_batched_tokens=budget)
    harness.add("talker", [1, 2, 3], max_tokens=40)
    harness.step()
    for index in range(5):
        harness.add(f"long{index}", [index] * 50, max_tokens=3)
    talked = 0
    chunked = 0
    while harness.engine.has_unfinished_requests:
        before = len(harness.outputs["talker"].outputs[0].token_ids) if "talker" in harness.outputs else 0
        harness.step()
        plan = harness.executor.plans[-1]
        assert plan.num_tokens <= budget
        assert len(plan.grants) <= 8
        chunked += sum(0 < grant.start and grant.num_tokens > 1 for grant in plan.grants)
        if not harness.outputs["talker"].finished or before < 40:
            assert len(harness.tokens("talker")) == before + 1
            talked += 1
    assert talked == 39  # the first came before
    assert chunked > 0 or budget == 100
    assert harness.tokens("talker") == expected([1, 2, 3], 40)


def test_fcfs_admits_in_order_and_none_overtakes() -> None:
    """A large request at the head waits for blocks; a small one behind it does not slip past (no starvation)."""
    harness = Harness(num_blocks=20)
    harness.add("first", [1] * 40, max_tokens=20)
    harness.step()
    harness.add("large", [2] * 44, max_tokens=4)
    harness.add("small", [3] * 4, max_tokens=2)
    order = []
    while harness.engine.has_unfinished_requests:
        order += [output.request_id for output in harness.step() if output.finished]
    assert order == ["first", "small", "large"] or order == ["first", "large", "small"]
    admitted = [event.request_id for event in harness.engine.events.of(EventKind.ADMITTED)]
    assert admitted == ["first", "large", "small"]
    waits = {(e.request_id, e.reason) for e in harness.engine.events.of(EventKind.WAITING)}
    assert ("large", Reason.NO_BLOCKS) in waits


def test_places_are_a_reason_to_wait() -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abc":
        harness.add(name, [1, 2], max_tokens=3)
    harness.step()
    assert {e.reason for e in harness.engine.events.of(EventKind.WAITING)} == {Reason.MAX_NUM_SEQS}
    harness.run()


def test_priority_goes_before_arrival_and_preempts_the_least_important() -> None:
    harness = Harness(num_blocks=12, max_num_seqs=8, policy="priority")
    harness.add("slow", [1] * 16, max_tokens=16, priority=5)
    harness.step()
    harness.add("urgent", [2] * 16, max_tokens=16, priority=-1)
    harness.add("later", [3] * 16, max_tokens=16, priority=9)
    finished = []
    while harness.engine.has_unfinished_requests:
        finished += [output.request_id for output in harness.step() if output.finished]
    assert finished == ["urgent", "slow", "later"]
    preempted = {event.request_id for event in harness.engine.events.of(EventKind.PREEMPTED)}
    assert preempted and "urgent" not in preempted


def test_fcfs_ignores_no_priority() -> None:
    """Under fcfs the queue is by arrival alone."""
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=8)
    harness.add("a", [1, 2], max_tokens=2, priority=5)
    harness.add("b", [1, 2], max_tokens=2, priority=1)
    finished = []
    while harness.engine.has_unfinished_requests:
        finished += [output.request_id for output in harness.step() if output.finished]
    assert finished == ["a", "b"]


def test_a_budget_below_the_places_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=7)


@pytest.mark.parametrize("why", ["places", "blocks"])
def test_a_longer_cached_prefix_that_does_not_fit_holds_nobody_up(why: str) -> None:
    """Guards against a head of the queue that waits behind a later request which was chosen for its cached prefix and
    cannot be admitted itself."""
    cached = list(range(16))
    harness = Harness(num_blocks=64 if why == "places" else 16, max_num_seqs=4, max_num_batched_tokens=64)
    harness.add("before", cached, max_tokens=1)
    harness.run()
    harness.add("running", [1] * 9, max_tokens=30)
    harness.step()
    harness.add("head", [9] * 3, max_tokens=4)
    if why == "places":
        harness.add("wide", [*cached, 1], max_tokens=4, n=4)
    else:
        harness.add("wide", [*cached, *[1] * 40], max_tokens=4)
    for _ in range(5):
        harness.step()
    assert harness.outputs["head"].finished, "it fits, and it is its turn"
    assert "wide" not in harness.outputs
    harness.run()
    assert harness.tokens("head") == expected([9] * 3, 4)
