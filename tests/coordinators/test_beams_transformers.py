"""Beam search on `reference` in float32 is transformers' `generate`: tokens, order and scores, over the whole grid."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams
from octavo.core.events import EventKind
from tests.coordinators.beam_models import prompt
from tests.oracle.beam_compare import BeamTally, Scored, our_traces, their_trace
from tests.oracle.beams import search

WIDTHS = (1, 2, 3, 4, 8, 16)
LENGTH_PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)
EARLY_STOPPING: tuple[bool | str, ...] = (False, True, "never")
GRID = list(itertools.product(WIDTHS, LENGTH_PENALTIES, EARLY_STOPPING))
LENGTHS = (1, 5, 17, 33, 48)  # of prompts, on and off the edges of blocks
MAX_TOKENS = (6, 14, 24)
TOLERANCE = 4e-6  # float32: 2**-18

Case = tuple[list[int], BeamSearchParams]
Making = Callable[..., Path]
Loading = Callable[[Path], Any]


def cases(seed: int) -> list[Case]:
    """Every point of the grid once, each with a prompt of its own."""
    made = []
    for number, (width, penalty, early) in enumerate(GRID):
        params = BeamSearchParams(
            beam_width=width,
            length_penalty=penalty,
            early_stopping=early,
            max_tokens=MAX_TOKENS[(number + seed) % len(MAX_TOKENS)],
        )
        made.append((prompt(LENGTHS[(number * 2 + seed) % len(LENGTHS)], 100 * seed + number), params))
    return made


def ends_of(folder: Path) -> list[int]:
    return json.loads((folder / "config.json").read_text())["eos_token_id"]


def compare(llm: LLM, model: Any, ends: list[int], given: list[Case], tally: BeamTally) -> None:
    """All cases in one call of ours; each alone with transformers."""
    with our_traces() as traces:
        outputs = llm.beam_search(
            [{"prompt_token_ids": token_ids} for token_ids, _ in given], [p for _, p in given], use_tqdm=False
        )
    for (token_ids, params), output in zip(given, outputs, strict=True):
        assert output.error is None
        ours: list[Scored] = [(tuple(one.token_ids), one.score) for one in output.outputs]  # type: ignore[misc]
        assert len(ours) == params.num_return_sequences
        with their_trace(model) as theirs:
            found = search(
                model,
                token_ids,
                ends,
                num_beams=params.width,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                max_new_tokens=params.max_tokens,
            )
        expected = [(tuple(tokens), score) for tokens, score in found]
        what = f"width {params.width}, penalty {params.length_penalty:g}, {params.early_stopping}, {len(token_ids)}"
        trace = traces[output.request_id]
        if not tally.same(what, ours, expected):
            tally.excuse(what, trace, theirs, ours, expected)
        elif params.width > 1:
            assert len(trace) == len(theirs), what
        tally.early += len(trace) < (params.max_tokens or 0)
        tally.stopped += sum(one.finish_reason == "stop" for one in output.outputs)
        for one in output.outputs:
            assert one.finish_reason == ("stop" if one.token_ids[-1] in ends else "length")


@pytest.fixture(scope="module")
def llama(beam_model: Making) -> Path:
    return beam_model("llama-grouped-heads")


@pytest.fixture(scope="module")
def llm(llama: Path) -> Iterator[LLM]:
    with LLM(str(llama), backend="reference", max_num_seqs=64, max_model_len=96) as llm:
        yield llm


def test_the_grid(llm: LLM, llama: Path, beam_oracle: Loading) -> None:
    """90 cases, prompts of 1 to 48 tokens in one call; end tokens are the likeliest there are."""
    tally = BeamTally(TOLERANCE)
    given = cases(0)
    compare(llm, beam_oracle(llama), ends_of(llama), given, tally)
    tally.finish()
    assert tally.searches == len(GRID) >= 60
    assert tally.early > 20 and tally.stopped > 100 and tally.hypotheses - tally.stopped > 50


def test_settings_matter(llm: LLM) -> None:
    """Guards against a grid all of whose points are one search: each setting changes some result."""
    given = [{"prompt_token_ids": prompt(length, length)} for length in range(1, 40, 2)]

    def results(**settings: Any) -> list[list[tuple[list[int], float | None]]]:
        params = BeamSearchParams(beam_width=4, max_tokens=24, **settings)
        return [[(one.token_ids, one.score) for one in output.outputs] for output in llm.beam_search(given, params)]

    def tokens(**settings: Any) -> list[list[list[int]]]:
        return [[ids for ids, _ in result] for result in results(**settings)]

    by_penalty = [tokens(length_penalty=penalty) for penalty in LENGTH_PENALTIES]  # -1 and 0 only differ in scores
    assert all(a != b for a, b in itertools.combinations(by_penalty[1:], 2))
    by_stopping = [tokens(length_penalty=1.0, early_stopping=early) for early in EARLY_STOPPING]
    assert all(a != b for a, b in itertools.combinations(by_stopping, 2))


@pytest.mark.slow
def test_the_grid_when_preempted(llama: Path, beam_oracle: Loading) -> None:
    """Guards against whole groups that are not restored as they were, in memory for little more than one of them."""
    tally = BeamTally(TOLERANCE)
    given = [
        (token_ids[:9], params.but(ignore_eos=True, max_tokens=40))
        for token_ids, params in cases(3)[::2]
        if params.width in (3, 4)
    ]
    with LLM(str(llama), backend="reference", max_num_seqs=32, max_model_len=96) as roomy:
        block_bytes = roomy.memory_plan.block_bytes
    with LLM(
        str(llama), backend="reference", max_num_seqs=32, max_model_len=96, kv_cache_memory_bytes=14 * block_bytes
    ) as small:
        compare(small, beam_oracle(llama), [], given, tally)
        assert len(small._engine.events.of(EventKind.PREEMPTED)) > 3
        assert small.cache_stats.copied_blocks > 0 and small.cache_stats.evicted_blocks > 0
    tally.finish()


@pytest.mark.slow
def test_many_models(beam_model: Making, beam_oracle: Loading) -> None:
    """540 cases: two families, three numbers of end tokens, tied embeddings, two sets of prompts."""
    total = BeamTally(TOLERANCE)
    for variant, num_ends in (("llama-tied", 1), ("gemma3", 2), ("mistral-window", 3)):
        folder = beam_model(variant, num_ends)
        assert len(ends_of(folder)) == num_ends
        with LLM(str(folder), backend="reference", max_num_seqs=64, max_model_len=96) as llm:
            for seed in (1, 2):
                compare(llm, beam_oracle(folder), ends_of(folder), cases(seed), total)
    total.finish()
    assert total.searches == 6 * len(GRID) >= 500
    assert total.early > 120 and total.stopped > 600 and total.hypotheses - total.stopped > 300
