"""Prefixes of several tiles that many rows read together, in pools too small for all: completions, samples, searches,
sessions that branch, guesses, and callers who go away. Each answer is that of the same request alone."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from octavo import AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from octavo.core.events import Event, EventKind
from tests.backends.cpu.engine import awkward_llama
from tests.invariance.harness import prompt

VOCAB_LOW = 90  # of token ids in prompts
MAX_MODEL_LEN = 400
REQUESTS = 36


@dataclass(frozen=True)
class Asked:
    kind: str
    token_ids: tuple[int, ...]
    seed: int
    count: int  # tokens
    leaves: int | None  # after so many outputs; None: never


def random_requests() -> list[Asked]:
    rng = random.Random(14)
    prefixes = [prompt(length, VOCAB_LOW, seed=length) for length in (300, 200, 140)]
    prefixes.append(prefixes[0][:200] + prompt(60, VOCAB_LOW, seed=1))
    found = []
    for seed in range(REQUESTS):
        chosen = rng.choice(prefixes)
        shared = rng.choice([len(chosen), len(chosen), 64, 130])
        token_ids = chosen[:shared] + prompt(rng.randint(1, 20), VOCAB_LOW, seed)
        kind = rng.choice(["greedy", "drawn", "samples", "beams", "session"])
        leaves = rng.randint(0, 8) if kind != "session" and rng.random() < 0.35 else None
        found.append(Asked(kind, tuple(token_ids), seed, rng.randint(4, 30), leaves))
    return found


async def answer(llm: AsyncLLM, asked: Asked, priority: int = 0) -> Any:
    """All that a user gets, or None when he went away."""
    given = {"prompt_token_ids": list(asked.token_ids)}
    if asked.kind == "session":
        async with llm.session(seed=asked.seed, priority=priority) as session:
            await session.extend(given)
            forks = await session.fork(3)
            outputs = await asyncio.gather(
                *(one.generate(max_tokens=asked.count, ignore_eos=True, logprobs=2) for one in [session, *forks])
            )
            return [(one.token_ids, one.logprobs) for one in outputs]
    if asked.kind == "beams":
        params = BeamSearchParams(beam_width=3, max_tokens=asked.count, speculative_decoding=False)
        outputs = llm.beam_search(given, params, priority=priority)
    else:
        sampling = SamplingParams(
            max_tokens=asked.count,
            temperature=0 if asked.kind == "greedy" else 0.9,
            n=3 if asked.kind == "samples" else 1,
            seed=asked.seed,
            ignore_eos=True,
            logprobs=2,
            detokenize=False,
        )
        outputs = llm.generate(given, sampling, priority=priority)
    last: RequestOutput | None = None
    number = 0
    async with aclosing(outputs):
        async for output in outputs:
            if number == asked.leaves:
                return None
            last, number = output, number + 1
    assert last is not None and last.finished
    return [(one.token_ids, one.logprobs, one.cumulative_logprob) for one in last.outputs]


@pytest.fixture(scope="module")
def folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awkward_llama(tmp_path_factory.mktemp("model") / "three-kv-heads", tiny_llama_dir)


def alone(folder: Path, kv_dtype: str) -> list[Any]:
    async def ask_all() -> list[Any]:
        llm = AsyncLLM(
            str(folder), backend="cpu", threads=1, max_model_len=MAX_MODEL_LEN, cascade_attention=False,
            enable_prefix_caching=False, kv_cache_dtype=kv_dtype,
        )  # fmt: skip
        found = [await answer(llm, replace(one, leaves=None)) for one in random_requests()]
        llm.close()
        return found

    return asyncio.run(ask_all())


@pytest.mark.parametrize("kv_dtype", ["int8", "float16"])
def test_many_that_share_long_prefixes(folder: Path, kv_dtype: str) -> None:
    expected = alone(folder, kv_dtype)
    for threads, guesses in ((1, None), (2, {"method": "suffix", "adaptive": False}), (3, None)):
        asyncio.run(check_together(folder, kv_dtype, expected, threads, guesses))


async def check_together(
    folder: Path, kv_dtype: str, expected: list[Any], threads: int, guesses: dict[str, Any] | None
) -> None:
    settings: dict[str, Any] = {"backend": "cpu", "kv_cache_dtype": kv_dtype, "max_model_len": MAX_MODEL_LEN}
    probe = AsyncLLM(str(folder), threads=1, **settings)
    block_bytes = probe.memory_plan.block_bytes
    probe.close()
    llm = AsyncLLM(
        str(folder),
        threads=threads,
        max_num_seqs=14,
        max_num_batched_tokens=96,
        kv_cache_memory_bytes=36 * block_bytes,
        scheduling_policy="priority",
        speculative_config=guesses,
        **settings,
    )
    events: list[Event] = []
    llm._loop.engine.events.subscribe(events.append)
    requests = random_requests()
    answers = await asyncio.gather(*(answer(llm, one, priority=n % 3) for n, one in enumerate(requests)))
    engine = llm._loop.engine
    for one, got, wanted in zip(requests, answers, expected, strict=True):
        assert got == wanted or (got is None and one.leaves is not None), one
    left = sum(got is None for got in answers)
    machine = engine._executor._runner._ops.machine
    shared = machine.shared_tiles
    llm.close()
    assert engine.kv.num_available == engine.kv.num_blocks
    assert left > 4 and shared > 1000
    assert any(event.kind is EventKind.PREEMPTED for event in events), "the pool was large enough for all"
