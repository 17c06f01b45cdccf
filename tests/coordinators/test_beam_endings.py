"""Beam searches that end before their time, and what a search does not depend on, through LLM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, RequestOutput, SamplingParams
from octavo.coordinators.beams import BeamCoordinator
from octavo.core.errors import RequestFailedError
from octavo.core.events import EventKind
from octavo.core.plan import StepPlan
from octavo.engine import Engine
from tests.coordinators.beam_models import prompt

SETTINGS: dict[str, Any] = {"backend": "reference", "max_num_seqs": 64, "max_model_len": 112}
ROUNDING = 2e-6  # of scores: float32


@pytest.fixture(scope="module")
def llm(beam_model: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(str(beam_model("llama-grouped-heads")), **SETTINGS) as llm:
        yield llm


def ids(length: int, seed: int = 0) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt(length, seed)}


def tokens(output: RequestOutput) -> list[list[int]]:
    assert output.error is None
    return [one.token_ids for one in output.outputs]


def same(got: RequestOutput, expected: RequestOutput) -> None:
    """NumPy's products may round differently for another number of rows, so scores are equal up to rounding."""
    assert tokens(got) == tokens(expected)
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=ROUNDING)
        assert (ours.text, ours.finish_reason, ours.stop_reason) == (
            theirs.text,
            theirs.finish_reason,
            theirs.stop_reason,
        )


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": 1},
        {"block_size": 32, "long_prefill_token_threshold": 5},
        {"max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"max_num_seqs": 8, "cascade_attention": False},
    ],
    ids=str,
)
def test_depends_on_its_own_settings_alone(llm: LLM, config: dict[str, Any]) -> None:
    """Neighbours, among them samples; block sizes; chunks of the prompt; the cache, cold and warm."""
    given = [ids(length, length) for length in (1, 16, 21, 40, 64)]
    params = [BeamSearchParams(beam_width=w, max_tokens=16, ignore_eos=w == 8) for w in (2, 8, 3, 4, 8)]
    alone = [llm.beam_search(one, p)[0] for one, p in zip(given, params, strict=True)]
    with LLM(llm.config.model, **SETTINGS | config) as other:
        for neighbours in range(2):  # the second time with the first one's blocks in the cache
            others = [other._frontend.make(ids(9, n), SamplingParams(n=2, seed=n)).spec for n in range(neighbours * 4)]
            other._loop.add(others, lambda output: None)
            for output, expected in zip(other.beam_search(given, params), alone, strict=True):
                same(output, expected)
            other._loop.abort([one.request_id for one in others])
        assert other.cache_stats.copied_blocks > 0 or config.get("block_size") == 1
        assert (other.cache_stats.hit_tokens > 0) == other.config.enable_prefix_caching


def test_no_token_left(llm: LLM) -> None:
    """It ends with an error that says why and what was found so far; its neighbour does not notice."""
    dead = BeamSearchParams(
        beam_width=3, max_tokens=9, allowed_token_ids=[10, 20], no_repeat_ngram_size=1, ignore_eos=True
    )
    alive = BeamSearchParams(beam_width=3, max_tokens=9)
    given = {"prompt_token_ids": [1, 2, 3]}
    failed, output = llm.beam_search([given, given], [dead, alive])
    assert "no_repeat_ngram_size" in (failed.error or "")
    assert sorted(one.token_ids for one in failed.outputs) == [[10, 20], [20, 10]]
    assert {one.finish_reason for one in failed.outputs} == {"error"}
    assert tokens(output) == tokens(llm.beam_search(given, alive)[0])
    with pytest.raises(RequestFailedError, match="no_repeat_ngram_size"):
        list(llm.stream(given, dead))


@pytest.mark.parametrize("groups", [1, 2])
def test_abort_gives_what_there_was(llm: LLM, groups: int) -> None:
    """At any step; with groups of which one may have ended."""
    params = BeamSearchParams(
        beam_width=4, max_tokens=24, num_beam_groups=groups, diversity_penalty=groups - 1.0, early_stopping=True
    )
    lengths = set()
    one_ended = 0

    def ended_early(engine: Engine, seed: int, steps: int) -> RequestOutput | None:
        nonlocal one_ended
        request = BeamCoordinator(llm._frontend.make_beams(ids(7, seed), params).spec)
        engine.add(request)
        for _ in range(steps):
            engine.step()
        one_ended += any(group.search.ended for group in request._groups) and not request.finished
        output = engine.abort(request.request_id)
        assert engine.kv.num_available == engine.kv.num_blocks
        return output

    for seed, steps in itertools.product(range(6), range(24)):
        # In the engine's own thread, which else might take steps beside these.
        output = llm._loop.ask(partial(ended_early, seed=seed, steps=steps)).result(60)
        if output is None:
            continue
        assert {one.finish_reason for one in output.outputs} == {"abort"}
        assert len(output.outputs) <= 4 and output.finished
        lengths.add(max(len(one.token_ids) for one in output.outputs))
        assert all(a.score >= b.score for a, b in itertools.pairwise(output.outputs))  # type: ignore[operator]
    assert len(lengths) > 4 and (one_ended > 0) == (groups > 1)


def test_an_error_gives_what_there_was(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=20, ignore_eos=True)
    executor = llm._engine._executor

    class Failing:
        steps = 0

        def execute(self, plan: StepPlan) -> Any:
            self.steps += 1
            if self.steps > 6:
                raise RuntimeError("out of paper")
            return executor.execute(plan)

    llm._engine._executor = Failing()  # type: ignore[assignment]
    try:
        (output,) = llm.beam_search(ids(5, 5), params)
    finally:
        llm._engine._executor = executor
    assert "out of paper" in (output.error or "")
    assert {(len(one.token_ids), one.finish_reason) for one in output.outputs} == {(6, "error")}
    assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    assert llm._engine.events.of(EventKind.FAILED)
