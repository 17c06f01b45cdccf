"""Beams over shared blocks, bookkeeping alone: what is forked, what is copied, what preemption and aborts leave behind.

The executor has no model but checks every KV slot that is read; a row of it is a pure function of the tokens before it,
so a plain loop over the same rows says what every search has to find.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo.coordinators.beams import BeamCoordinator
from octavo.core.beam_params import BeamSearchParams
from octavo.core.events import EventKind
from octavo.core.outputs import RequestOutput
from octavo.core.plan import RowResult
from octavo.core.request import RequestSpec
from octavo.core.want import TopK, Want
from tests.coordinators.plain_search import log_softmax, plain_search
from tests.engine.fake import VOCAB, FakeExecutor, Harness, expected, next_token

END = 7


def logits(token_ids: list[int]) -> NDArray[np.float32]:
    return np.random.default_rng(next_token(token_ids) + 1000 * len(token_ids)).normal(0, 2, VOCAB).astype(np.float32)


class BeamExecutor(FakeExecutor):
    """Answers TopK with the best of a row."""

    def row(self, position: int, want: Want, seen: list[int], index: int) -> RowResult:
        if isinstance(want, TopK):
            row = log_softmax(logits(seen))
            best = np.argsort(-row, kind="stable")[: want.k]
            return RowResult(position, candidates=tuple((int(i), float(row[i])) for i in best))
        return super().row(position, want, seen, index)


class BeamHarness(Harness):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.executor = self.engine._executor = BeamExecutor(self.kv.block_size, self.executor.sequences)
        self.forks = 0
        self.referred = self.distinct = 0  # blocks in tables, and different ones, summed over steps
        fork = self.kv.fork

        def counted(*arguments: Any) -> Any:
            self.forks += 1
            return fork(*arguments)

        self.kv.fork = counted  # type: ignore[method-assign]

    def search(self, name: str, prompt: list[int], params: BeamSearchParams, priority: int = 0) -> BeamCoordinator:
        request = RequestSpec(
            name,
            tuple(prompt),
            params.sampling,
            0,
            params.max_tokens or 0,
            params,
            eos_token_ids=(END,),
            priority=priority,
            arrival_time=self.now,
        )
        coordinator = BeamCoordinator(request)
        self.engine.add(coordinator)
        return coordinator

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        tables = [sequence.block_table for sequence in self.sequences()]
        self.referred += sum(map(len, tables))
        self.distinct += len({block for table in tables for block in table})
        return outputs

    def found(self, name: str) -> list[tuple[tuple[int, ...], float | None]]:
        return [(tuple(one.token_ids), one.score) for one in self.outputs[name].outputs]


def alone(prompt: list[int], params: BeamSearchParams) -> list[tuple[tuple[int, ...], float | None]]:
    found = plain_search(
        logits,
        prompt,
        width=params.width,
        max_tokens=params.max_tokens or 0,
        ends=(END,),
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping if params.width > 1 else True,  # one beam is greedy decoding
        groups=params.num_beam_groups,
        diversity=params.diversity_penalty,
    )
    return [(one.tokens, one.score) for one in found[: params.num_outputs]]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("prompt_length", [1, 15, 16, 33])
def test_forks_and_copies(block_size: int, prompt_length: int) -> None:
    """The first continuation of a beam keeps its sequence, others fork; the prompt is computed once; and a copy is made
    only of a block that is part full."""
    harness = BeamHarness(num_blocks=200, block_size=block_size, max_num_batched_tokens=64)
    prompt = [3] * prompt_length
    params = BeamSearchParams(beam_width=4, max_tokens=40, length_penalty=0.0, early_stopping="never")
    beams = harness.search("beams", prompt, params)
    before: set[int] = set()
    forks = 0
    while harness.engine.has_unfinished_requests:
        harness.step()
        now = {sequence.id for sequence in beams.sequences}
        if before and now:
            assert harness.forks - forks == len(now - before), "a sequence that was there is not made anew"
        before, forks = now, harness.forks
    assert harness.found("beams") == alone(prompt, params)
    steps = len(harness.executor.plans)
    assert harness.forks > 10
    assert all(len(plan.grants) <= 4 for plan in harness.executor.plans)
    assert harness.executor.computed <= prompt_length + 4 * (steps - 1), "something was computed twice"
    for plan in harness.executor.plans:
        assert {copy.target for copy in plan.copies} <= {grant.block_table[-1] for grant in plan.grants}
    assert (harness.executor.copied > 0) == (block_size > 1)
    assert harness.executor.copied <= harness.forks


def test_blocks_saved_by_sharing() -> None:
    """The vLLM paper's metric, blocks saved over blocks without sharing: with a prompt half as long as the answer, what
    beams have in common is most of what they are."""
    harness = BeamHarness(num_blocks=400, block_size=16, max_num_seqs=8)
    params = BeamSearchParams(beam_width=8, max_tokens=128, length_penalty=0.0, early_stopping="never")
    harness.search("beams", [1, 2] * 32, params)
    harness.run()
    saved = 1 - harness.distinct / harness.referred
    print(f"{saved:.1%} of blocks saved")
    assert saved > 0.5


def test_groups_stay_in_order_and_shrink() -> None:
    """Sequences stand in the order of the groups and their beams; a group that has ended needs no places."""
    harness = BeamHarness(num_blocks=200)
    params = BeamSearchParams(
        beam_width=6, num_beam_groups=3, diversity_penalty=1.5, max_tokens=24, early_stopping=True
    )
    beams = harness.search("groups", [4, 5, 6], params)
    widths = []
    while harness.engine.has_unfinished_requests:
        harness.step()
        widths.append(beams.width)
        assert [s.id for s in beams.sequences] == [b.sequence.id for group in beams._groups for b in group.beams]
        assert len(beams.sequences) <= max(beams.width, 1)
    assert harness.found("groups") == alone([4, 5, 6], params)
    assert sorted(widths, reverse=True) == widths and len(set(widths)) > 2, "no group ended before the others"


def test_one_step_for_all_and_preemption() -> None:
    """Searches in a pool that holds one of them at most: whole groups are preempted, restored and end as alone."""
    harness = BeamHarness(num_blocks=44, block_size=4, max_num_seqs=16, max_num_batched_tokens=24)
    asked = {}
    for number in range(6):
        prompt = [number] * (9 + 5 * number)
        params = BeamSearchParams(beam_width=(2, 4, 8)[number % 3], max_tokens=16 + number, early_stopping=True)
        harness.search(f"s{number}", prompt, params)
        asked[f"s{number}"] = (prompt, params)
    harness.add("old", [1] * 20, max_tokens=30)
    harness.run()
    for name, (prompt, params) in asked.items():
        assert harness.found(name) == alone(prompt, params), name
    assert harness.tokens("old") == expected([1] * 20, 30)
    assert harness.engine.events.of(EventKind.PREEMPTED), "nothing was preempted: the test shows nothing"
    for plan in harness.executor.plans:
        by_request: dict[str, int] = {}
        for grant in plan.grants:
            by_request[grant.request_id] = by_request.get(grant.request_id, 0) + bool(grant.wants)
        assert all(rows <= asked[name][1].width for name, rows in by_request.items() if name in asked)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_storm(seed: int) -> None:
    """Searches, samples, completions and aborts at random in a pool too small for them: 3,000 operations a seed, each
    search checked against the plain loop."""
    rng = random.Random(seed)
    block_size = rng.choice([2, 4])
    harness = BeamHarness(
        num_blocks={2: 26, 4: 16}[block_size],  # what one search of width 4 can take
        block_size=block_size,
        max_num_seqs=8,
        max_num_batched_tokens=rng.choice([9, 13, 64]),
        max_chunk_tokens=rng.choice([None, 3]),
        caching=seed % 2 == 0,
    )
    searches: dict[str, tuple[list[int], BeamSearchParams]] = {}
    others: dict[str, tuple[list[int], int, int]] = {}
    aborted: set[str] = set()
    moments: set[int] = set()
    for operation in range(3_000):
        action = rng.random()
        if action < 0.25 and harness.engine.num_requests < 8:
            name = f"r{operation}"
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
            if rng.random() < 0.6:
                params = BeamSearchParams(
                    beam_width=rng.choice([1, 2, 3, 4]),
                    max_tokens=rng.randint(1, 8),
                    early_stopping=rng.choice([True, False, "never"]),
                    length_penalty=rng.choice([-1.0, 0.0, 1.0]),
                )
                harness.search(name, prompt, params)
                searches[name] = (prompt, params)
            else:
                others[name] = (prompt, rng.randint(1, 12), rng.choice([1, 3]))
                harness.add(name, prompt, others[name][1], n=others[name][2])
        elif action < 0.28:
            running = [c.request_id for c in harness.engine.scheduler.coordinators() if c.lockstep]
            if running:
                name = rng.choice(running)
                output = harness.engine.abort(name)
                assert output is not None and {one.finish_reason for one in output.outputs} == {"abort"}
                aborted.add(name)
                moments.add(len(output.outputs[0].token_ids))
                harness.check()
        else:
            harness.step()
    harness.run()
    answered = [name for name in searches if name not in aborted]
    for name in answered:
        error = harness.outputs[name].error
        assert error is None, error
        assert harness.found(name) == alone(*searches[name]), name
    for name, (prompt, count, n) in others.items():
        for index in range(n):
            assert harness.tokens(name, index) == expected(prompt, count, index)
    assert len(answered) > 60 and len(aborted) > 20 and len(moments) > 3
    assert harness.forks > 100 and harness.kv.num_copies > 0
    assert sum(harness.outputs[name].metrics.num_preemptions for name in answered) > 0
