"""Requests with known answers, ways of running them, and counts of what really happened on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo import LLM, RequestOutput, SamplingParams
from octavo.core.events import EventKind
from octavo.core.outputs import CompletionOutput, Logprob
from octavo.core.plan import StepPlan
from octavo.core.want import Sample
from tests.sessions import run_as

TOLERANCE = 1e-4  # of log-probabilities
Request = tuple[list[int], SamplingParams]


@dataclass
class Counts:
    """What happened while requests ran: a test of invariance that met nothing has shown nothing."""

    chunks: int = 0  # grants that ended before the last known token of their sequence
    mixed: int = 0  # steps with rows of several requests
    beside: int = 0  # steps in which one request decoded beside another's prompt
    shared: int = 0  # steps in which two sequences read the same block
    copies: int = 0  # blocks copied on write
    preemptions: int = 0
    hits: int = 0  # tokens taken from the prefix cache
    cache_evictions: int = 0  # blocks
    shared_tiles: int = 0  # tiles of keys that rows of several sequences read together
    compared: int = 0  # tokens
    excused: list[str] = field(default_factory=list)

    def add_plan(self, plan: StepPlan) -> None:
        grants = plan.grants
        self.chunks += sum(not any(isinstance(one.want, Sample) for one in grant.wants) for grant in grants)
        requests = {grant.request_id for grant in grants}
        self.mixed += len(requests) > 1
        sizes = {grant.num_tokens == 1 for grant in grants}
        self.beside += len(requests) > 1 and len(sizes) == 2
        blocks = [block for grant in grants for block in grant.block_table]
        self.shared += len(set(blocks)) < len(blocks)
        self.copies += len(plan.copies)


class _Watched:
    """The executor, with every plan counted."""

    def __init__(self, executor: Any, counts: Counts) -> None:
        self._executor, self._counts = executor, counts

    def execute(self, plan: StepPlan) -> Any:
        self._counts.add_plan(plan)
        return self._executor.execute(plan)

    def close(self) -> None:
        self._executor.close()


def run(llm: LLM, requests: Sequence[Request], counts: Counts | None = None) -> list[RequestOutput]:
    """All requests at once; nothing may be left behind."""
    engine, executor = llm._engine, llm._engine._executor  # no door leads to plans and events
    before = len(engine.events.of(EventKind.PREEMPTED))
    stats = llm.cache_stats
    if counts is not None:
        engine._executor = _Watched(executor, counts)
    try:
        prompts = [{"prompt_token_ids": token_ids} for token_ids, _ in requests]
        outputs = llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
    finally:
        engine._executor = executor
    if counts is not None:
        counts.preemptions += len(engine.events.of(EventKind.PREEMPTED)) - before
        counts.hits += llm.cache_stats.hit_tokens - stats.hit_tokens
        counts.cache_evictions += llm.cache_stats.evicted_blocks - stats.evicted_blocks
    assert engine.kv.num_available == engine.kv.num_blocks
    assert [output.error for output in outputs] == [None] * len(outputs)
    return outputs


def run_alone(llm: LLM, requests: Sequence[Request]) -> list[RequestOutput]:
    """Each by itself and with nothing cached."""
    outputs = []
    for request in requests:
        llm.reset_prefix_cache()
        outputs += run(llm, [request])
    return outputs


def run_stream(llm: LLM, request: Request, index: int) -> CompletionOutput:
    """Output `index` of a request as the only output of a request of its own."""
    return run_as(llm, *request, index=index).outputs[0]


def same(got: RequestOutput, expected: RequestOutput, counts: Counts) -> None:
    assert len(got.outputs) == len(expected.outputs)
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        same_output(ours, theirs, counts)
    assert (got.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    for ours, theirs in zip((got.prompt_logprobs or ())[1:], (expected.prompt_logprobs or ())[1:], strict=True):
        assert ours is not None and theirs is not None
        assert _distance(ours, theirs) <= TOLERANCE


def same_output(got: CompletionOutput, expected: CompletionOutput, counts: Counts) -> None:
    """The same tokens and log-probabilities. A greedy choice may differ, and then everything after it, where the two
    best were closer than twice what rounding moved them by."""
    assert got.logprobs is not None and expected.logprobs is not None
    assert len(got.token_ids) == len(expected.token_ids)
    for step, (ours, theirs) in enumerate(zip(got.token_ids, expected.token_ids, strict=True)):
        counts.compared += 1
        delta = _distance(got.logprobs[step], expected.logprobs[step])
        assert delta <= TOLERANCE, f"step {step}: log-probabilities differ by {delta:.2e}"
        if ours != theirs:
            best, second = sorted((entry.logprob for entry in expected.logprobs[step].values()), reverse=True)[:2]
            note = f"step {step}: {ours} for {theirs}, gap {best - second:.2e}, difference {delta:.2e}"
            assert best - second < 2 * delta and expected.logprobs[step][theirs].rank == 1, note
            counts.excused.append(note)
            print("excused:", note)
            return
    assert got.finish_reason == expected.finish_reason


def _distance(a: dict[int, Logprob], b: dict[int, Logprob]) -> float:
    common = a.keys() & b.keys()
    assert len(common) >= len(a) - 1, "more than the last of the best tokens differ"
    return max(abs(a[token].logprob - b[token].logprob) for token in common)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, special ones (below 3) not among them."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, vocab_size, length)]


def mixed_requests(vocab_size: int, max_tokens: int = 20) -> list[Request]:
    """Greedy and sampled, with penalties and filters, one with its prompt's log-probabilities, one with several
    outputs; prompts from 1 to 70 tokens, on and off the edges of blocks."""
    common: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True, "logprobs": 4, "detokenize": False}
    kinds: list[tuple[int, dict[str, Any]]] = [
        (1, {"temperature": 0}),
        (16, {"temperature": 0}),
        (33, {"temperature": 1.0, "seed": 11}),
        (70, {"temperature": 0, "prompt_logprobs": 3}),
        (17, {"temperature": 1.3, "seed": 12, "top_p": 0.9, "top_k": 40}),
        (48, {"temperature": 0.8, "seed": 13, "repetition_penalty": 1.3, "presence_penalty": 0.4, "min_p": 0.01}),
        (21, {"temperature": 1.0, "seed": 14, "n": 3}),
    ]
    return [
        (prompt(length, vocab_size, seed), SamplingParams(**common, **params))
        for seed, (length, params) in enumerate(kinds)
    ]
