"""What Prometheus reads of a server at work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo import MarginsParams, SamplingParams
from octavo.server.metrics import Metrics
from octavo.server.served_llm import ServedLLM

from .test_remote import LONG, SETTINGS, last, until

DRAWN = SamplingParams(temperature=0.8, max_tokens=9, seed=3, ignore_eos=True)


@pytest.fixture
def served(tiny_dir: Path) -> Iterator[ServedLLM]:
    llm = ServedLLM(str(tiny_dir), **SETTINGS)
    llm.metrics = Metrics(llm.figures, "tiny", vllm_names=True)
    yield llm
    llm.close()


def read(llm: ServedLLM) -> dict[str, float]:
    assert llm.metrics is not None
    found = {}
    for family in text_string_to_metric_families(llm.metrics.exposition().decode()):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "le")]
            assert sample.labels["model_name"] == "tiny"
            if "le" not in sample.labels:
                found[" ".join([sample.name, *labels])] = sample.value
    return found


async def test_requests_are_counted(served: ServedLLM) -> None:
    for _ in range(3):
        await last(served, "A whale", DRAWN.but(n=2))
    running = served.generate("A", LONG)
    await anext(running)
    await running.aclose()
    margins = MarginsParams(segment_tokens=90, margin=DRAWN.but(seed=None), answer=DRAWN.but(seed=None), seed=1)
    await (await served.margins("The whale is white. " * 20, "Is it?", margins)).result()
    await served.embed("A whale")
    figures = read(served)
    prompt = len(served.tokenizer.encode("A whale"))
    assert figures["octavo_request_success_total length"] == 4
    assert figures["octavo_request_success_total stop"] == 1  # the embedding
    assert figures["octavo_request_success_total abort"] == figures["octavo_num_aborted_requests_total"] == 1
    assert figures["octavo_request_prompt_tokens_count"] == 4
    assert figures["octavo_request_prompt_tokens_sum"] == 4 * prompt
    assert figures["octavo_request_params_n_sum"] == 6
    assert figures["octavo_request_generation_tokens_count"] == 5
    # Notes in margins are generated as well; of what was given up no more than what was told.
    of_ended = figures["octavo_request_generation_tokens_sum"]
    assert of_ended > 3 * 18 + 9 and 0 <= figures["octavo_generation_tokens_total"] - of_ended < LONG.max_tokens
    for name, number in {"time_to_first_token": 4, "e2e_request_latency": 5, "request_queue_time": 5}.items():
        assert figures[f"octavo_{name}_seconds_count"] == number
        assert 0 <= figures[f"octavo_{name}_seconds_sum"] < 600
    assert figures["octavo_inter_token_latency_seconds_count"] >= 3 * 8
    same = {name.removeprefix("octavo_"): value for name, value in figures.items() if name.startswith("octavo_")}
    other = {name.removeprefix("vllm:"): value for name, value in figures.items() if name.startswith("vllm:")}
    for name, value in same.items():
        if "_created" not in name:
            assert other[name] == value, name


async def test_the_engine_tells_of_itself(served: ServedLLM) -> None:
    async with served.session() as session:
        await session.extend("A whale is white. " * 5)
        await session.generate(DRAWN)
        await until(lambda: read(served)["octavo_kv_cache_usage_perc"] > 0)
        figures = read(served)
        assert figures["octavo_kv_cache_usage_perc"] <= 1 and figures["octavo_engine_steps_total"] > 0
    await last(served, "A whale", DRAWN)
    await until(lambda: read(served)["octavo_kv_cache_usage_perc"] == 0)
    figures = read(served)
    assert figures["octavo_num_requests_running"] == figures["octavo_engine_restarts"] == 0
    await until(lambda: read(served)["octavo_prefix_cache_queries_total"] > 0)
    assert read(served)["octavo_computed_tokens_total"] > 0


async def test_guesses_are_counted(tiny_dir: Path, served: ServedLLM) -> None:
    """Also through the wire between the server and its engine; without speculative_config nothing is told."""
    assert not any("spec_decode" in name for name in read(served)) and served.speculation_stats is None
    llm = ServedLLM(str(tiny_dir), **SETTINGS, speculative_config={"method": "suffix", "adaptive": False})
    llm.metrics = Metrics(llm.figures, "tiny", vllm_names=True)
    try:
        few = SamplingParams(temperature=1, seed=3, max_tokens=40, allowed_token_ids=[65, 66], ignore_eos=True)
        output = await last(llm, "ABABABABAB", few)
        await until(lambda: read(llm).get("octavo_spec_decode_num_drafts_total", 0) > 0)
        await until(lambda: read(llm)["octavo_num_requests_running"] == 0)
        figures = read(llm)
        drafted, accepted = output.metrics.num_draft_tokens, output.metrics.num_accepted_tokens
        assert figures["octavo_spec_decode_num_draft_tokens_total"] == drafted > accepted > 0
        assert figures["octavo_spec_decode_num_accepted_tokens_total"] == accepted
        by_position = [v for n, v in figures.items() if n.startswith("octavo_spec_decode_num_accepted_tokens_per_pos")]
        assert sum(v for v in by_position if v < 1e9) == accepted
        assert figures["octavo_spec_decode_tokens_per_step"] > 1
        assert figures["vllm:spec_decode_num_drafts_total"] == figures["octavo_spec_decode_num_drafts_total"]
        stats = llm.speculation_stats
        assert stats is not None and stats.num_accepted_tokens == accepted
    finally:
        llm.close()
