"""Plans are values: what an engine did can be recorded, and carried out again without it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.core.plan import StepPlan, StepResult
from octavo.runner.model_runner import ModelRunner

SETTINGS: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 40, "max_model_len": 192}


@pytest.mark.parametrize("model", ["tiny_gemma3_dir", "tiny_llama_dir"])
def test_recorded_steps_give_the_same_again(request: pytest.FixtureRequest, model: str) -> None:
    """Chunks, forks, copies, searches, penalties: each step's results, on KV that nobody has written yet."""
    folder: Path = request.getfixturevalue(model)
    recorded: list[tuple[bytes, StepResult]] = []

    def record(plan: StepPlan, result: StepResult) -> None:
        recorded.append((pickle.dumps(plan), result))

    prompts = ["the quick brown fox jumps over the lazy dog " * n for n in (1, 2, 3, 1)]
    with LLM(str(folder), **SETTINGS) as llm:
        block_bytes = llm.memory_plan.block_bytes
    with LLM(str(folder), kv_cache_memory_bytes=16 * block_bytes, **SETTINGS) as llm:
        llm._engine.step_listeners.append(record)
        params = SamplingParams(max_tokens=12, n=3, seed=1, logprobs=2, presence_penalty=0.5, ignore_eos=True)
        llm.generate(prompts, params)
        llm.generate(prompts, params.but(n=1, prompt_logprobs=1, temperature=0, bad_words=["the"]))
        llm.beam_search(prompts[:2], BeamSearchParams(beam_width=4, max_tokens=8, no_repeat_ngram_size=2))
        copies = llm.cache_stats.copied_blocks
    with LLM(str(folder), kv_cache_memory_bytes=16 * block_bytes, **SETTINGS) as llm:
        runner = llm._engine._executor._runner  # type: ignore[attr-defined]
        assert isinstance(runner, ModelRunner)
        for pickled, expected in recorded:
            assert runner.run(pickle.loads(pickled)).results == expected.results
    assert copies > 3 and len(recorded) > 30
    assert sum(len(pickle.loads(pickled).grants) > 1 for pickled, _ in recorded) > 20
