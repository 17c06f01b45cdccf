"""A storm over a real engine with blocks in files: many clients at once in a pool too small for them, callers who go
away at random moments, and somebody who damages the files meanwhile. Each answer is that of the same request alone."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.core.events import EventKind
from octavo.core.outputs import RequestOutput
from tests.heads import save_random_head
from tests.invariance.harness import prompt
from tests.sessions import run_as, state_of

BLOCKS = 22
CONFIG: dict[str, Any] = {"backend": "cpu", "threads": 2, "max_model_len": 256, "max_num_seqs": 12}


class Client:
    """What it asks is a function of its number; how far that gets before it goes away is a matter of time."""

    def __init__(
        self, llm: AsyncLLM, alone: LLM, seed: int, counts: Counter[str], checks: list[Callable[[], None]]
    ) -> None:
        self.llm, self.alone, self.counts, self.checks = llm, alone, counts, checks
        self.rng = random.Random(seed)
        self.vocab_size = llm.model_config.vocab_size
        self.documents = [prompt(180, self.vocab_size, number) for number in range(3)]

    def a_prompt(self, most: int) -> list[int]:
        rng = self.rng
        shared = rng.randint(0, most)
        return rng.choice(self.documents)[:shared] + prompt(rng.randint(1, 12), self.vocab_size, rng.randrange(10**6))

    def params(self) -> SamplingParams:
        rng = self.rng
        penalties: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.3} if rng.random() < 0.4 else {}
        return SamplingParams(
            max_tokens=rng.randint(1, 20), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(100), ignore_eos=True,
            logprobs=1, detokenize=False, skip_reading_prefix_cache=rng.random() < 0.1, **penalties,
        )  # fmt: skip

    async def run(self) -> None:
        kind = self.rng.choice([self.generate, self.generate, self.search, self.session])
        limit = self.rng.choice([None, None, None, 0.0, 0.003, 0.02, 0.1])
        try:
            async with asyncio.timeout(limit):
                await kind()
        except TimeoutError:
            self.counts["gone"] += 1

    async def last(self, answer: Any) -> RequestOutput:
        async with aclosing(answer):
            outputs = [output async for output in answer]
        assert outputs[-1].finished and outputs[-1].error is None
        return outputs[-1]

    async def generate(self) -> None:
        asked, params = {"prompt_token_ids": self.a_prompt(170)}, self.params().but(n=self.rng.choice([1, 1, 3]))
        got = await self.last(self.llm.generate(asked, params))
        self.counts["generated"] += 1
        self.checks.append(lambda: same(got, self.alone.generate(asked, params, use_tqdm=False)[0]))

    async def search(self) -> None:
        asked = {"prompt_token_ids": self.a_prompt(120)}
        params = BeamSearchParams(
            beam_width=self.rng.choice([2, 4]), max_tokens=self.rng.randint(1, 16), logprobs=1,
            speculative_decoding=False,
        )  # fmt: skip
        got = await self.last(self.llm.beam_search(asked, params))
        self.counts["searched"] += 1
        self.checks.append(lambda: same(got, self.alone.beam_search(asked, params, use_tqdm=False)[0]))

    async def session(self) -> None:
        rng = self.rng
        async with self.llm.session(seed=rng.randrange(100)) as s:
            await s.extend({"prompt_token_ids": self.a_prompt(120)})
            branches = [s, *await s.fork(rng.randint(1, 3))]
            for _ in range(3):
                branch = rng.choice(branches)
                # Some of these are waited for too short a time; what comes after is as if they had not been.
                if rng.random() < 0.5:
                    calls = [branch.generate(self.session_params()), branch.select(self.choices()), branch.fork(2)]
                    call = calls.pop(rng.randrange(3))
                    for other in calls:
                        other.close()
                    held, made = branch.token_ids, state_of(branch).num_generated
                    try:
                        await asyncio.wait_for(call, rng.choice([0.0, 0.001, 0.01]))
                    except TimeoutError:
                        assert branch.token_ids == held and state_of(branch).num_generated == made
                        self.counts["taken back"] += 1
                before, number = branch.token_ids, state_of(branch).num_generated
                params = self.session_params()
                got = await branch.generate(params)
                assert branch.token_ids == before + got.token_ids
                stream = (*state_of(branch).path, number)
                self.checks.append(lambda a=before, p=params, st=stream, g=got: self.plain(a, p, st, g))  # type: ignore[misc]
                self.counts["continued"] += 1

    def session_params(self) -> SamplingParams:
        return self.params().but(skip_reading_prefix_cache=False)

    def choices(self) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": prompt(length, self.vocab_size, length)} for length in (1, 5, 20)]

    def plain(self, before: list[int], params: SamplingParams, stream: tuple[int, ...], got: Any) -> None:
        output = run_as(self.alone, before, params, stream=stream)
        assert (output.outputs[0].token_ids, bits(output.outputs[0])) == (got.token_ids, bits(got))


def damage(folder: Path, rng: random.Random) -> bool:
    """Damages one file: cut, grown to an absurd size, changed, removed, replaced by a link or by another block."""
    files = sorted(path for path in folder.glob("*.kv") if not path.is_symlink())
    if not files:
        return False
    path, how = rng.choice(files), rng.randrange(6)
    try:
        if how == 0:
            os.truncate(path, rng.randrange(2000))
        elif how == 1:
            os.truncate(path, 200 << 30)
        elif how == 2:
            with path.open("r+b") as file:
                file.seek(rng.randrange(1000))
                file.write(b"\xff")
        elif how == 3:
            path.unlink()
        elif how == 4:
            path.unlink()
            path.symlink_to("/dev/zero")
        else:
            with rng.choice(files).open("rb") as file:
                other = file.read(1 << 20)
            path.write_bytes(other)
    except OSError:  # the engine removed it meanwhile, or it is a link already
        return False
    return True


def bits(output: Any) -> list[list[tuple[int, float]]]:
    return [[(token_id, entry.logprob) for token_id, entry in row.items()] for row in output.logprobs]


def same(got: RequestOutput, expected: RequestOutput) -> None:
    assert [one.token_ids for one in got.outputs] == [one.token_ids for one in expected.outputs]
    assert [bits(one) for one in got.outputs] == [bits(one) for one in expected.outputs]


@pytest.mark.parametrize(
    ("seed", "kv_dtype", "guessing"),
    [
        (0, "float16", None),
        (1, "int8", None),
        (2, "int8", "suffix"),
        (3, "int8", "draft_model"),
        (4, "int8", "draft_head"),
    ],
)
async def test_storm(tiny_gemma3_dir: Path, tmp_path: Path, seed: int, kv_dtype: str, guessing: str | None) -> None:
    folder = tmp_path / "kv"
    speculation: dict[str, Any] | None = None
    if guessing is not None:
        speculation = {"method": guessing, "num_speculative_tokens": 4, "adaptive": False}
        # A model that guesses for itself is right as long as it reads the right blocks.
        speculation |= {"model": str(tiny_gemma3_dir)} if guessing == "draft_model" else {}
        if guessing == "draft_head":
            speculation["model"] = str(save_random_head(tmp_path / "head.safetensors", tiny_gemma3_dir))
        speculation |= {"suffix_decoding_max_cached_requests": 20} if guessing == "suffix" else {}
    config = CONFIG | {"kv_cache_dtype": kv_dtype}
    with LLM(str(tiny_gemma3_dir), **config, enable_prefix_caching=False) as alone:
        size = alone.memory_plan.block_bytes * (2 if guessing == "draft_model" else 1)
        llm = AsyncLLM(
            str(tiny_gemma3_dir), **config, kv_cache_memory_bytes=BLOCKS * size, max_num_batched_tokens=48,
            kv_offload_dir=str(folder), kv_offload_bytes=60 * size, speculative_config=speculation,
        )  # fmt: skip
        llm._loop.engine.kv.prefixes.tier._timer = lambda: 0.0  # type: ignore[union-attr] # whatever the disk does, it is asked
        counts: Counter[str] = Counter()
        checks: list[Callable[[], None]] = []
        running: set[asyncio.Task[None]] = set()
        rng = random.Random(seed)
        for number in range(150):
            running.add(asyncio.create_task(Client(llm, alone, 1000 * seed + number, counts, checks).run()))
            if len(running) >= 10:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                counts["damaged"] += damage(folder, rng)
        await asyncio.gather(*running)
        kv, events = llm._loop.engine.kv, llm._loop.engine.events
        while llm.num_unfinished_requests:  # of those who went away
            await asyncio.sleep(0.001)
        assert kv.num_available == kv.num_blocks
        evicted = events.of(EventKind.PREEMPTED) + events.of(EventKind.EVICTED)
        await asyncio.to_thread(llm.close)
        for check in checks:
            check()
        assert min(counts[name] for name in ("generated", "searched", "continued", "gone", "taken back")) > 8, counts
        assert counts["damaged"] > 5 and kv.stats.loaded_blocks > 20 and kv.num_copies > 20, (counts, kv.stats)
        assert len(evicted) > 5
        if guessing is not None:
            stats = llm.speculation_stats
            assert stats is not None and stats.num_accepted_tokens > 20, stats
