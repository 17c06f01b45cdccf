"""Beam search with SmolLM2-135M-Instruct on `reference` against transformers' recorded hypotheses, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams
from tests.oracle.beam_compare import BeamTally, Scored, our_traces, their_trace
from tests.oracle.beams import END_TOKEN_IDS, GRID, PROMPTS, Search, read, search
from tests.oracle.oracle import FOLDER, load_model

FILE = FOLDER / "smollm2_beams.json"
TOLERANCE = 3e-5  # of scores: logits of either program are 30 layers of float32 sums

Loading = Callable[[], Any]


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Loading:
    return cache(lambda: load_model(smollm2_path))


def compare(llm: LLM, searches: list[Search], oracle: Loading, tally: BeamTally) -> None:
    """All of them in one call of ours."""
    with our_traces() as traces:
        outputs = llm.beam_search(
            [{"prompt_token_ids": one.prompt_token_ids} for one in searches],
            [BeamSearchParams(beam_width=one.width, max_tokens=one.max_tokens) for one in searches],
            use_tqdm=False,
        )
    for one, output in zip(searches, outputs, strict=True):
        assert output.error is None
        what = f"prompt {one.number}, width {one.width}, {one.max_tokens} tokens"
        ours: list[Scored] = [(tuple(found.token_ids), found.score) for found in output.outputs]  # type: ignore[misc]
        theirs = [(tuple(tokens), score) for tokens, score in zip(one.token_ids, one.scores, strict=True)]
        if not tally.same(what, ours, theirs):
            with their_trace(oracle()) as trace:
                live = run_theirs(oracle(), one)
            tally.excuse(what, traces[output.request_id], trace, ours, live)
        tally.early += len(traces[output.request_id]) < one.max_tokens
        tally.stopped += sum(found.finish_reason == "stop" for found in output.outputs)


def run_theirs(model: Any, one: Search) -> list[Scored]:
    found = search(model, one.prompt_token_ids, list(END_TOKEN_IDS), num_beams=one.width, max_new_tokens=one.max_tokens)
    return [(tuple(tokens), score) for tokens, score in found]


def test_the_file_covers_what_it_should(smollm2_llm: LLM) -> None:
    """Guards against an oracle that shrank: 23 prompts of 20 to 500 tokens, each with every width and length."""
    head, searches = read(FILE)
    assert {(one.width, one.max_tokens, one.number) for one in searches} == {
        (width, max_tokens, number) for width, max_tokens in GRID for number in PROMPTS
    }
    lengths = sorted(len(one.prompt_token_ids) for one in searches)
    assert len(PROMPTS) >= 20 and lengths[0] >= 20 and lengths[-1] == 500 and len(searches) == 92
    assert {(width, length) for width in (4, 8) for length in (64, 256)} == set(GRID)
    assert all(len(one.token_ids) == len(one.scores) == one.width for one in searches)
    assert all(one.scores == sorted(one.scores, reverse=True) for one in searches)
    assert {"transformers", "torch", "gguf"} <= set(head["made_with"])
    assert FILE.stat().st_size < 300_000
    assert smollm2_llm.tokenizer.eos_token_ids == END_TOKEN_IDS


@pytest.mark.slow  # tests/coordinators has tiny models search beside transformers
@pytest.mark.parametrize(("width", "max_tokens"), GRID)
def test_all_recorded_searches(smollm2_llm: LLM, oracle: Loading, width: int, max_tokens: int) -> None:
    tally = BeamTally(TOLERANCE)
    searches = [one for one in read(FILE)[1] if (one.width, one.max_tokens) == (width, max_tokens)]
    compare(smollm2_llm, searches, oracle, tally)
    tally.finish()
    assert tally.searches == len(PROMPTS) and 0 < tally.stopped < tally.hypotheses


@pytest.mark.slow
@pytest.mark.parametrize(("width", "max_tokens"), GRID)
def test_the_oracle_is_what_transformers_says(oracle: Loading, width: int, max_tokens: int) -> None:
    """Three searches of each kind are made anew; all of them take the maker forty minutes."""
    searches = [one for one in read(FILE)[1] if (one.width, one.max_tokens) == (width, max_tokens)]
    for one in searches[:: len(searches) // 2]:
        live = run_theirs(oracle(), one)
        assert [list(tokens) for tokens, _ in live] == one.token_ids
        assert [score for _, score in live] == pytest.approx(one.scores, rel=TOLERANCE)
