"""Guessed and verified tokens on a real backend: the bits are those of drawing token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.core.events import EventKind
from octavo.core.plan import StepPlan, StepResult, num_accepted
from tests.proposing import Proposing

SETTINGS: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "max_model_len": 160}


class Guesser(Proposing):
    """Guesses from what requests alone were answered, and wrong at times."""

    def __init__(self, answers: list[list[int]], vocab_size: int) -> None:
        self._answers = answers  # prompt and output together
        self._vocab_size = vocab_size
        self._rng = random.Random(0)
        self.accepted = self.rejected = 0

    def guess(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        rng, known = self._rng, list(token_ids)
        following = [one[len(known) :] for one in self._answers if one[: len(known)] == known]
        guess = rng.choice(following)[: rng.randint(0, max_tokens)] if following else []
        return [rng.randrange(self._vocab_size) if rng.random() < 0.2 else token_id for token_id in guess]

    def note(self, plan: StepPlan, result: StepResult) -> None:
        for grant, one in zip(plan.grants, result.results, strict=True):
            accepted = num_accepted(grant, one.rows)
            self.accepted += accepted
            self.rejected += grant.num_drafts - accepted


def bits(output: RequestOutput) -> Any:
    return [
        (
            one.token_ids,
            one.text,
            one.cumulative_logprob,
            [{i: (entry.logprob, entry.rank) for i, entry in row.items()} for row in one.logprobs or ()],
            one.finish_reason,
        )
        for one in output.outputs
    ]


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("is_scarce", [False, True])
@pytest.mark.parametrize("branched", [False, True], ids=["chains", "trees"])
def test_the_same_bits(tiny_gemma3_dir: Path, kv_dtype: str, is_scarce: bool, branched: bool) -> None:
    """Sliding windows, samples, penalties, stop strings, a pool in which somebody is preempted, the prefix cache."""
    words = "the quick brown fox jumps over the lazy dog "
    prompts = [words * n for n in (1, 2, 1, 3)] + [words * 2 + "and "]
    common: dict[str, Any] = {"max_tokens": 40, "logprobs": 2, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, **common),
        SamplingParams(seed=1, n=3, presence_penalty=0.6, repetition_penalty=1.2, **common),
        SamplingParams(seed=2, top_p=0.9, stop=["e"], min_tokens=6, bad_words=["fox"], **common),
        SamplingParams(seed=3, top_k=20, min_p=0.01, **common),
        SamplingParams(temperature=0, logit_bias={7: 2.0}, **common),
    ]
    settings = SETTINGS | {"kv_cache_dtype": kv_dtype}
    with LLM(str(tiny_gemma3_dir), **settings, enable_prefix_caching=False) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
        block_bytes, vocab_size = llm.memory_plan.block_bytes, llm.model_config.vocab_size
    if is_scarce:
        settings["kv_cache_memory_bytes"] = 12 * block_bytes
    guesser = Guesser([[*o.prompt_token_ids, *one.token_ids] for o in alone for one in o.outputs], vocab_size)
    guesser.branched = branched
    with LLM(str(tiny_gemma3_dir), **settings) as llm:
        llm._engine.scheduler._proposer = guesser
        llm._engine.step_listeners.append(guesser.note)
        for _ in range(2):  # the second time with the first one's blocks in the cache
            together = llm.generate(prompts, params)
            assert [bits(output) for output in together] == [bits(output) for output in alone]
        preempted = len(llm._engine.events.of(EventKind.PREEMPTED))
        llm.reset_prefix_cache()
        assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    assert guesser.accepted > 50 and guesser.rejected > 20
    assert (preempted > 0) == is_scarce
