"""Random traffic in a pool too small for it: the conservation law holds after every step and no block is lost."""

from __future__ import annotations

import random

import pytest

from octavo.core.events import EventKind
from tests.engine.fake import VOCAB, Harness, expected


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(seed: int) -> None:
    """Requests, samples and aborts at random: 2,000 operations a seed, each answer checked against the model alone."""
    rng = random.Random(seed)
    harness = Harness(
        num_blocks=rng.choice([16, 20, 33]),
        block_size=rng.choice([1, 2, 4]) if seed % 2 else 4,
        max_num_seqs=rng.choice([3, 8]),
        max_num_batched_tokens=rng.choice([8, 13, 64]),
        max_chunk_tokens=rng.choice([None, 3]),
        policy=rng.choice(["fcfs", "priority"]),
    )
    capacity = harness.kv.capacity
    asked: dict[str, tuple[list[int], int, int, int]] = {}
    aborted: set[str] = set()
    for operation in range(2_000):
        action = rng.random()
        if action < 0.12 and harness.engine.num_requests < 12:
            name = f"r{operation}"
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, capacity // 2))]
            tokens = rng.randint(1, min(20, capacity - len(prompt)))
            n = rng.choice([1, 1, 2, 5])
            request_seed = rng.randrange(100)
            harness.add(name, prompt, tokens, priority=rng.randrange(3), n=n, seed=request_seed)
            asked[name] = (prompt, tokens, n, request_seed)
        elif action < 0.15 and asked:
            name = rng.choice(list(asked))
            if harness.engine.abort(name) is not None:
                aborted.add(name)
            harness.check()
        else:
            harness.step()
    harness.run()
    answered = [name for name in asked if name not in aborted]
    assert len(answered) > 50
    assert len(aborted) > 5
    assert harness.engine.events.of(EventKind.PREEMPTED) or harness.engine.events.of(EventKind.EVICTED)
    assert harness.kv.num_copies > 0
    for name in answered:
        prompt, tokens, n, request_seed = asked[name]
        for index in range(n):
            assert harness.tokens(name, index) == expected(prompt, tokens, index, request_seed)


def test_two_hundred_aborts_during_traffic() -> None:
    """Requests end at any moment: waiting, part prefilled, decoding, forked, preempted. Every block comes home."""
    rng = random.Random(7)
    harness = Harness(num_blocks=24, max_num_batched_tokens=10)
    moments: set[str] = set()
    aborts = 0
    names: list[str] = []
    while aborts < 200:
        while harness.engine.num_requests < 10:
            names.append(f"r{len(names)}")
            harness.add(names[-1], [rng.randrange(VOCAB)] * rng.randint(1, 40), 30, n=rng.choice([1, 3]))
        for _ in range(rng.randrange(4)):
            harness.step()
        name = rng.choice(names)
        coordinator = next((c for c in harness.engine.scheduler.coordinators() if c.request_id == name), None)
        if coordinator is None:
            assert harness.engine.abort(name) is None
            continue
        computed = [sequence.num_computed for sequence in coordinator.sequences]
        moments.add(
            "preempted" if coordinator.metrics.num_preemptions and not any(computed)
            else "waiting" if not any(computed)
            else "forked" if len(computed) > 1
            else "decoding" if coordinator.metrics.num_generated_tokens
            else "prefilling"
        )  # fmt: skip
        output = harness.engine.abort(name)
        harness.check()
        assert output is not None and output.finished
        assert {o.finish_reason for o in output.outputs} <= {"abort", "length"}
        aborts += 1
    assert moments == {"preempted", "waiting", "forked", "decoding", "prefilling"}
    harness.run()
