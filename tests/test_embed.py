"""Embeddings: hidden states after the final norm, pooled; beside transformers, beside others, in a pool too small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, AsyncLLM, InvalidRequestError, PoolingParams, SamplingParams
from octavo.core.pooling import pooled
from octavo.server.served_llm import ServedLLM

SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1024}
PROMPTS = ["A", "The whale is white.", "The sea is old. " * 30, "A captain far under the sails " * 9]
PLAIN = PoolingParams(normalize=False)


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        yield llm


def embeddings(llm: LLM, prompts: Any, params: Any = None) -> list[list[float]]:
    return [output.outputs.embedding for output in llm.embed(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("backend", "kv_cache_dtype", "tolerance"),
    [("cpu", "float16", 0.02), ("cpu", "int8", 0.05), ("reference", "float32", 0.02)],
)
def test_beside_transformers(tiny_dir: Path, backend: str, kv_cache_dtype: str, tolerance: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with LLM(str(tiny_dir), backend=backend, kv_cache_dtype=kv_cache_dtype, **SETTINGS) as llm:
        outputs = llm.embed(PROMPTS, PLAIN, use_tqdm=False)
        lasts = llm.embed(PROMPTS, PoolingParams(pooling="last", normalize=False), use_tqdm=False)
    for output, last in zip(outputs, lasts, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([output.prompt_token_ids]), output_hidden_states=True).hidden_states[-1][0]
        expected = states.mean(0).numpy()
        np.testing.assert_allclose(output.outputs.embedding, expected, rtol=0.02, atol=tolerance)
        np.testing.assert_allclose(last.outputs.embedding, states[-1].numpy(), rtol=0.02, atol=tolerance)
        assert output.finished and output.metrics.num_generated_tokens == 0


def test_the_same_beside_others_and_in_any_chunks(tiny: LLM, tiny_dir: Path) -> None:
    for params in (PLAIN, PoolingParams(pooling="last")):
        expected = [embeddings(tiny, prompt, params)[0] for prompt in PROMPTS]
        tiny.generate(PROMPTS, SamplingParams(max_tokens=5), use_tqdm=False)  # cached now
        assert embeddings(tiny, PROMPTS, params) == expected
        for settings in ({"max_num_batched_tokens": 17}, {"kv_cache_memory_bytes": 1 << 19, "max_model_len": 512}):
            with LLM(str(tiny_dir), **SETTINGS | settings) as llm:
                assert embeddings(llm, PROMPTS * 4, params) == expected * 4
                assert llm._loop.ask(lambda engine: engine.kv.num_blocks - engine.kv.num_available).result() == 0


def test_of_length_one_and_cut(tiny: LLM) -> None:
    (plain,), (unit,) = embeddings(tiny, "A", PLAIN), embeddings(tiny, "A")
    assert math.isclose(sum(value * value for value in unit), 1.0)
    np.testing.assert_allclose(unit, np.array(plain) / np.linalg.norm(plain))
    (cut,) = embeddings(tiny, "A", PoolingParams(dimensions=8))
    np.testing.assert_allclose(cut, np.array(plain[:8]) / np.linalg.norm(plain[:8]))
    assert pooled([0.0, 0.0], PoolingParams()) == [0.0, 0.0]


def test_all_of_the_context_may_be_prompt(tiny: LLM) -> None:
    whole = {"prompt_token_ids": [5] * 1024}
    assert len(embeddings(tiny, whole)[0]) == 64
    with pytest.raises(InvalidRequestError, match="has 1025 tokens; with max_model_len=1024 no more fit"):
        tiny.embed({"prompt_token_ids": [5] * 1025})


def test_sharing_is_by_salt(tiny: LLM) -> None:
    last = PoolingParams(pooling="last")
    tiny.reset_prefix_cache()
    first = tiny.embed({"prompt": PROMPTS[2], "cache_salt": "a"}, last, use_tqdm=False)[0]
    again = tiny.embed({"prompt": PROMPTS[2], "cache_salt": "a"}, last, use_tqdm=False)[0]
    other = tiny.embed({"prompt": PROMPTS[2], "cache_salt": "b"}, last, use_tqdm=False)[0]
    assert again.metrics.num_cached_tokens > 0 == first.metrics.num_cached_tokens == other.metrics.num_cached_tokens
    assert first.outputs == again.outputs == other.outputs


async def test_async_and_served(tiny: LLM, tiny_dir: Path) -> None:
    expected = embeddings(tiny, "The whale is white.")[0]
    async with AsyncLLM(str(tiny_dir), **SETTINGS) as llm:
        assert (await llm.embed("The whale is white.")).outputs.embedding == expected
    served = ServedLLM(str(tiny_dir), **SETTINGS)
    try:
        assert (await served.embed("The whale is white.")).outputs.embedding == expected
        with pytest.raises(InvalidRequestError, match="at most 64"):
            await served.embed("A", PoolingParams(dimensions=65))
    finally:
        served.close()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompts": ""}, "prompt"),
        ({"prompts": ["A", ""]}, "prompts[1]"),
        ({"prompts": "A", "pooling_params": 5}, "pooling_params"),
        ({"prompts": "A", "pooling_params": PoolingParams(dimensions=65)}, "dimensions"),
        ({"prompts": "A", "priority": 1}, "priority"),
    ],
)
def test_refused(tiny: LLM, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tiny.embed(**given)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [({"pooling": "max"}, "pooling"), ({"normalize": 1}, "normalize"), ({"dimensions": 0}, "dimensions")],
)
def test_bad_parameters(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PoolingParams(**given)
    assert caught.value.field == field
