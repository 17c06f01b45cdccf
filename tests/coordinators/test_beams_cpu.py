"""Beam search on the `cpu` backend: the same bits alone and among neighbours, and what a plain loop finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, EngineConfig, RequestOutput
from octavo.cli.machine import make_ops
from octavo.core.events import EventKind
from octavo.loading.hf_config import config_from_folder
from tests.coordinators.beam_models import logits_of, prompt
from tests.coordinators.plain_search import plain_search

SETTINGS: list[dict[str, Any]] = [
    {"beam_width": 1},
    {"beam_width": 2, "length_penalty": 0.0},
    {"beam_width": 3, "length_penalty": 0.6, "early_stopping": True},
    {"beam_width": 4},
    {"beam_width": 4, "length_penalty": 2.0, "early_stopping": "never", "ignore_eos": True},
    {"beam_width": 8, "length_penalty": -1.0, "early_stopping": "never"},
    {"beam_width": 8, "ignore_eos": True},
    {"beam_width": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "ignore_eos": True},
    {"beam_width": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "early_stopping": True},
]
PROCESSED: list[dict[str, Any]] = [
    {"beam_width": 4, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "ignore_eos": True},
    {"beam_width": 3, "min_tokens": 12, "logit_bias": {5: 2.0}, "presence_penalty": 0.4},
]
LENGTHS = (1, 16, 33, 48, 7)
Search = tuple[list[int], BeamSearchParams]


def searches(settings: list[dict[str, Any]], max_tokens: int = 20) -> list[Search]:
    """Some prompts begin alike, so that the prefix cache has something to find."""
    shared = prompt(32, 1)
    return [
        (
            (shared if i % 3 == 0 else []) + prompt(LENGTHS[i % len(LENGTHS)], i),
            BeamSearchParams(max_tokens=max_tokens, logprobs=2, **given),
        )
        for i, given in enumerate(settings)
    ]


def run(llm: LLM, given: list[Search]) -> list[RequestOutput]:
    outputs = llm.beam_search([{"prompt_token_ids": ids} for ids, _ in given], [p for _, p in given], use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(given)
    assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    return outputs


def bits(output: RequestOutput) -> list[tuple[Any, ...]]:
    return [(one.token_ids, one.score, one.cumulative_logprob, one.logprobs, one.text) for one in output.outputs]


@pytest.fixture(scope="module", params=["llama3-rope", "gemma3"])
def folder(request: pytest.FixtureRequest, beam_model: Callable[..., Path]) -> Path:
    return beam_model(request.param)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), backend="cpu", max_num_seqs=64, max_model_len=112) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[tuple[Any, ...]]]:
    found = []
    for one in searches(SETTINGS + PROCESSED):
        llm.reset_prefix_cache()
        found.append(bits(run(llm, [one])[0]))
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_size": 32, "long_prefill_token_threshold": 5, "threads": 1},
        pytest.param({"block_size": 64, "max_num_batched_tokens": 70, "threads": 3}, marks=pytest.mark.slow),
        pytest.param({"cascade_attention": False, "enable_prefix_caching": False}, marks=pytest.mark.slow),
        {"kv_blocks": 32},
    ],
    ids=lambda config: " ".join(f"{name}={value}" for name, value in config.items()) or "as it is",
)
def test_the_same_bits_among_neighbours(
    folder: Path, llm: LLM, alone: list[list[tuple[Any, ...]]], config: dict[str, Any]
) -> None:
    """Twice, forwards and backwards: cold, then with everything in the prefix cache that fits there."""
    settings: dict[str, Any] = {"max_num_seqs": 64, "max_model_len": 112} | config
    if blocks := settings.pop("kv_blocks", None):
        settings["kv_cache_memory_bytes"] = blocks * llm.memory_plan.block_bytes
    given = searches(SETTINGS + PROCESSED)
    with LLM(str(folder), backend="cpu", **settings) as other:
        assert [bits(output) for output in run(other, given)] == alone
        assert [bits(output) for output in run(other, given[::-1])] == alone[::-1]
        stats = other.cache_stats
        assert stats.copied_blocks > 0
        assert (stats.hit_tokens > 0) == other.config.enable_prefix_caching
        if blocks:
            assert other._engine.events.of(EventKind.PREEMPTED) and stats.evicted_blocks > 0


def test_a_plain_loop_over_the_same_logits(folder: Path, llm: LLM) -> None:
    """Groups too: the loop is the independent reference of diverse search."""
    logits = logits_of(folder, make_ops(EngineConfig.resolve({"backend": "cpu"}), config_from_folder(folder)))
    given = searches(SETTINGS, max_tokens=12)
    stopped = 0
    for (token_ids, params), output in zip(given, run(llm, given), strict=True):
        ends = () if params.ignore_eos else llm.tokenizer.eos_token_ids
        expected = plain_search(
            logits,
            token_ids,
            width=params.width,
            max_tokens=12,
            ends=ends,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping if params.width > 1 else True,
            groups=params.num_beam_groups,
            diversity=params.diversity_penalty,
        )
        assert [tuple(one.token_ids) for one in output.outputs] == [one.tokens for one in expected], params
        for one, (_, score) in zip(output.outputs, expected, strict=True):
            assert one.score == pytest.approx(score, rel=1e-6)
            stopped += one.finish_reason == "stop"
    assert stopped > 5
