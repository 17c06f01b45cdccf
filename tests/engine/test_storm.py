"""Random traffic in a pool too small for it: the conservation law holds after every step and no block is lost."""

from __future__ import annotations

import random
from functools import cache

import pytest

from octavo.core.beam_params import BeamSearchParams
from octavo.core.events import EventKind
from octavo.core.request import RequestSpec
from tests.engine.fake import VOCAB, Harness, expected


def beams(harness: Harness, name: str, prompt: list[int], tokens: int, width: int) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=tokens)
    request = RequestSpec(
        name, tuple(prompt), params.sampling, seed=0, max_tokens=tokens, beams=params, eos_token_ids=(7, 8)
    )
    harness.engine.add_request(request)


@cache
def beams_alone(prompt: tuple[int, ...], tokens: int, width: int) -> list[list[int]]:
    harness = Harness(num_blocks=400, max_num_seqs=64, max_num_batched_tokens=256, caching=False)
    beams(harness, "alone", list(prompt), tokens, width)
    return [output.token_ids for output in harness.run()["alone"].outputs]


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic(seed: int) -> None:
    """Requests, samples, beams and aborts at random, over a few common beginnings: 2,600 operations a seed, each answer
    checked against the model alone, the law after every step."""
    rng = random.Random(seed)
    harness = Harness(
        num_blocks=rng.choice([20, 26, 33]),
        block_size=rng.choice([1, 2, 4]) if seed % 2 else 4,
        caching=seed % 4 != 3,
        max_num_seqs=rng.choice([4, 8]),
        max_num_batched_tokens=rng.choice([8, 13, 64]),
        max_chunk_tokens=rng.choice([None, 3]),
        policy=rng.choice(["fcfs", "priority"]),
        max_overtakes=rng.choice([0, 1, 16]),
    )
    capacity = harness.kv.capacity
    beginnings = [[rng.randrange(VOCAB) for _ in range(capacity)] for _ in range(3)]
    asked: dict[str, tuple[list[int], int, int, int]] = {}
    searches: dict[str, tuple[list[int], int, int]] = {}
    aborted: set[str] = set()
    resets = 0

    def a_prompt() -> list[int]:
        length = rng.randint(1, capacity // 2)
        shared = rng.randint(0, length)
        return rng.choice(beginnings)[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]

    for operation in range(2_600):
        action = rng.random()
        name = f"r{operation}"
        if action < 0.12 and harness.engine.num_requests < 12:
            prompt = a_prompt()
            tokens = rng.randint(1, min(20, capacity - len(prompt)))
            if action < 0.03:
                prompt, width = prompt[: capacity // 6], rng.choice([2, 3, 4])
                tokens = min(tokens, max(capacity // 6 // width, 1))
                beams(harness, name, prompt, tokens, width)
                searches[name] = (prompt, tokens, width)
                continue
            n = rng.choice([1, 1, 2, 5])
            request_seed = rng.randrange(100)
            salt = rng.choice([None, None, "a", "b"])
            skip = rng.random() < 0.1
            harness.add(
                name, prompt, tokens, priority=rng.randrange(3), n=n, seed=request_seed, salt=salt,
                skip_reading_prefix_cache=skip,
            )  # fmt: skip
            asked[name] = (prompt, tokens, n, request_seed)
        elif action < 0.15 and asked:
            name = rng.choice([*list(asked)[-12:], *list(searches)[-3:]])
            if harness.engine.abort(name) is not None:
                aborted.add(name)
            harness.check()
        elif action < 0.152:
            resets += harness.engine.reset_prefix_cache() > 0
            harness.check()
        else:
            harness.step()
    harness.run()
    answered = [name for name in asked if name not in aborted]
    searched = [name for name in searches if name not in aborted]
    assert len(answered) > 50 and len(searched) > 5 and len(aborted) > 5 and resets > 0
    assert harness.engine.events.of(EventKind.PREEMPTED) or harness.engine.events.of(EventKind.EVICTED)
    assert harness.kv.num_copies > 0 or harness.kv.block_size == 1
    assert harness.kv.stats.hit_tokens > 100
    assert harness.kv.stats.evicted_blocks > 100
    for name in answered:
        prompt, tokens, n, request_seed = asked[name]
        for index in range(n):
            assert harness.tokens(name, index) == expected(prompt, tokens, index, request_seed)
    for name in searched:
        prompt, tokens, width = searches[name]
        got = [output.token_ids for output in harness.outputs[name].outputs]
        assert harness.outputs[name].error is None and got == beams_alone(tuple(prompt), tokens, width)


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
