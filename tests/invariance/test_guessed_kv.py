"""What was guessed wrong is never read, and what is drawn beside guesses has the model's distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.core.plan import StepPlan, StepResult, accepted_drafts
from octavo.runner.input_batch import slot_of
from tests.invariance.test_drafts import Guesser, bits

TEMPERATURE = 4.0  # so that no pair of tokens is rare
WORDS = "the quick brown fox jumps over the lazy dog "


def poison(llm: LLM, plan: StepPlan, result: StepResult) -> int:
    """NaN in K and V of every slot that a rejected guess was computed in; how many there were."""
    runner = llm._engine._executor._runner  # type: ignore[attr-defined]
    found = 0
    for grant, one in zip(plan.grants, result.results, strict=True):
        if one.error is not None:
            continue
        good = grant.first_draft + len(accepted_drafts(grant, one.rows))
        for position in range(good, grant.stop):
            slot = slot_of(grant, position, llm._engine.kv.block_size)
            for kv in runner._kv:
                _poison_slot(kv, slot, llm._engine.kv.block_size)
            found += 1
    return found


def _poison_slot(kv: Any, slot: int, block_size: int) -> None:
    block, offset = divmod(slot, block_size)
    if hasattr(kv, "k"):  # of the reference backend
        kv.k[block, offset] = kv.v[block, offset] = np.nan
        return
    data = bytearray(kv.layer.read_block(block))
    values = np.frombuffer(data, np.float32)  # K as [heads, D, block], then V as [heads, block, D]
    keys, vectors = values[: len(values) // 2], values[len(values) // 2 :]
    heads = 2
    keys.reshape(heads, -1, block_size)[:, :, offset] = np.nan
    vectors.reshape(heads, block_size, -1)[:, offset] = np.nan
    kv.layer.write_block(block, bytes(data))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("branched", [False, True], ids=["chains", "trees"])
def test_rejected_kv_is_never_read(tiny_dir: Path, backend: str, branched: bool) -> None:
    """Guards against a slot that is read before it is computed again, in this sequence or by whoever gets the block."""
    settings = {"backend": backend, "kv_cache_dtype": "float32", "max_model_len": 160, "max_num_seqs": 8}
    prompts = [WORDS * n for n in (1, 2, 1)] + [WORDS + "and", WORDS * 2]
    params = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1),
        SamplingParams(seed=1, n=2, max_tokens=30, ignore_eos=True, logprobs=1),
    ]
    given = [params[number % 2] for number in range(len(prompts))]
    with LLM(str(tiny_dir), **settings) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, given, strict=True)]
        vocab_size, block_bytes = llm.model_config.vocab_size, llm.memory_plan.block_bytes
    guesser = Guesser([[*o.prompt_token_ids, *one.token_ids] for o in alone for one in o.outputs], vocab_size)
    guesser.branched = branched
    poisoned = 0
    with LLM(str(tiny_dir), **settings, kv_cache_memory_bytes=24 * block_bytes) as llm:
        llm._engine.scheduler._proposer = guesser

        def listen(plan: StepPlan, result: StepResult) -> None:
            nonlocal poisoned
            poisoned += poison(llm, plan, result)

        llm._engine.step_listeners += [listen, guesser.note]
        for _ in range(2):
            together = llm.generate(prompts, given)
            if backend == "cpu":
                assert [bits(one) for one in together] == [bits(one) for one in alone]
            else:  # whose log-probabilities are equal up to rounding
                assert [[o.token_ids for o in one.outputs] for one in together] == [
                    [o.token_ids for o in one.outputs] for one in alone
                ]
    assert poisoned > 30 and guesser.accepted > 20


def test_samples_have_the_models_distribution(tiny_dir: Path) -> None:
    """Pairs of tokens out of eight, drawn while guesses are verified, beside the exact probabilities: a chi-square
    test."""
    allowed = [11, 17, 23, 31, 37, 41, 43, 47]
    context = [allowed[i % 8] for i in (0, 3, 5, 0, 3, 5, 0, 3, 5, 0)]
    config = {"method": "suffix", "adaptive": False, "suffix_decoding_max_cached_requests": 64}
    with LLM(str(tiny_dir), max_model_len=64, max_logprobs=4096, max_num_seqs=64, speculative_config=config) as llm:
        vocab_size = llm.model_config.vocab_size
        probe = SamplingParams(temperature=0, max_tokens=1, logprobs=vocab_size, ignore_eos=True)

        def exact(tokens: list[int]) -> np.ndarray:
            (output,) = llm.generate([{"prompt_token_ids": tokens}], probe)
            row = (output.outputs[0].logprobs or [{}])[0]
            chosen = np.exp([row[token].logprob / TEMPERATURE for token in allowed])
            return chosen / chosen.sum()

        first = exact(context)
        expected = np.array([p * exact([*context, token]) for p, token in zip(first, allowed, strict=True)])
        counts = np.zeros((8, 8))
        total = 0
        for seed in range(8):
            params = SamplingParams(
                n=500, seed=seed, max_tokens=3, temperature=TEMPERATURE, allowed_token_ids=allowed, ignore_eos=True
            )
            (output,) = llm.generate([{"prompt_token_ids": context}], params)
            for one in output.outputs:
                counts[allowed.index(one.token_ids[0]), allowed.index(one.token_ids[1])] += 1
                total += 1
        stats = llm.speculation_stats
    assert stats is not None and stats.num_accepted_tokens > 100
    assert stats.num_draft_tokens - stats.num_accepted_tokens > 100
    statistic = float(((counts - total * expected) ** 2 / (total * expected)).sum())
    assert statistic < 63 + 4 * (2 * 63) ** 0.5, "four standard deviations above the mean of 63 degrees of freedom"
    assert total * expected.min() > 5, "every cell is expected often enough for the test to be one"
