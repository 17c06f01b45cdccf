"""Grammars that meet a limit in the middle of what they are met in: samples, searches, sessions, margins, questions,
guesses that are verified. Each request ends by itself, with an error; the others' answers are those of alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AskParams, BeamSearchParams, MarginsParams, RequestFailedError, SamplingParams
from octavo.text import grammars
from tests.invariance.test_drafts import Guesser, bits
from tests.pace import held
from tests.test_ask import DOCUMENTS
from tests.test_margins import a_document
from tests.test_margins_pairs import check_home, folder, gave_way, occupied, scarce, together
from tests.test_structured_pairs import SETTINGS, a_prompt, a_request

__all__ = ["folder"]  # fixtures

AMBIGUOUS = {"grammar": "start: e+\ne: e e | /[a-z ]/ | e e e"}  # each token takes more than the one before
LIMIT = "Too many items"
WITH_LIMIT = SamplingParams(structured_outputs=AMBIGUOUS, max_tokens=40, min_tokens=40, temperature=1.3)
FREE = SamplingParams(max_tokens=9, temperature=1.0)
CONTEXT = 800  # tokens


@pytest.fixture(autouse=True)
def _few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_MAX_ITEMS", 300)


def failed(call: Callable[[], Any]) -> str:
    with pytest.raises(RequestFailedError) as caught:
        call()
    assert LIMIT in str(caught.value)
    return str(caught.value)


def one_that_ends(rng: random.Random) -> Callable[[LLM], Any]:
    """A request that meets the limit, as a function of the numbers alone."""
    prompt, kind = a_prompt(rng), rng.randrange(6)
    params = WITH_LIMIT.but(seed=rng.randrange(100))
    if kind == 0:

        def generated(llm: LLM) -> Any:
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            return output.error, bits(output)

        return generated
    if kind == 1:
        several = params.but(n=3)
        return lambda llm: llm.generate(prompt, several, use_tqdm=False)[0].error
    if kind == 2:
        width = rng.choice([2, 4])
        search = BeamSearchParams(
            beam_width=width, max_tokens=60, structured_outputs=AMBIGUOUS, early_stopping="never", length_penalty=5.0
        )

        def searched(llm: LLM) -> Any:
            (found,) = llm.beam_search(prompt, search, use_tqdm=False)
            return found.error, [(one.token_ids, one.score, one.finish_reason) for one in found.outputs]

        return searched
    if kind == 3:
        seed = rng.randrange(100)

        def branched(llm: LLM) -> Any:
            with llm.session(seed=seed) as session:
                session.extend(prompt)
                one, other = session.fork(2)
                before = one.token_ids
                wrong = failed(lambda: session.generate_all([one, other], [params, FREE]))
                assert one.token_ids == before
                beside = other.token_ids
                after = [branch.generate(FREE) for branch in (one, other, session)]
                return wrong, beside, [(output.token_ids, output.text) for output in after]

        return branched
    if kind == 4:
        which = rng.choice(["margin", "answer"])
        given: dict[str, Any] = {"margin": SamplingParams(max_tokens=9), "answer": SamplingParams(max_tokens=9)}
        reading = MarginsParams(segment_tokens=90, seed=5, **given | {which: params.but(seed=None)})
        document = a_document(rng.randrange(3), 8)
        return lambda llm: failed(lambda: llm.margins(document, "Who?", reading))
    asked = AskParams(num_passages=2, passage_tokens=64, answer=params.but(seed=None), seed=rng.randrange(100))
    return lambda llm: failed(lambda: llm.ask("Where is the whale?", documents=DOCUMENTS, params=asked))


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_storm(folder: Path, tmp_path: Path, kv_cache_dtype: str) -> None:
    """In a pool too small, with blocks in files, beside requests that meet no limit; the second time with a cache that
    is warm."""
    rng = random.Random(1)
    asked = [one_that_ends(rng) if number % 2 else a_request(rng) for number in range(32)]
    settings = SETTINGS | {"kv_cache_dtype": kv_cache_dtype, "max_model_len": CONTEXT}
    with LLM(str(folder), **settings, enable_prefix_caching=False) as llm:
        alone = [ask(llm) for ask in asked]
        settings |= scarce(llm, CONTEXT) | {"kv_offload_dir": str(tmp_path / "kv")}
    assert sum(LIMIT in str(one) for one in alone) >= 16
    with LLM(str(folder), **settings) as llm:
        for _ in range(2):
            found: dict[int, Any] = {}

            def work(first: int) -> None:
                found.update({number: asked[number](llm) for number in range(first, len(asked), 8)})  # noqa: B023

            with occupied(llm, CONTEXT - 50), held(llm._engine, lambda: llm._engine.num_requests >= 7):
                together(*(lambda first=first: work(first) for first in range(8)))  # type: ignore[misc]
            assert [found[number] for number in range(len(asked))] == alone
        assert gave_way(llm), "the pool was large enough for all"
        check_home(llm)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_guesses(tiny_dir: Path, backend: str) -> None:
    """A guess that leads to the limit is none; the request goes on, up to where it meets the limit by itself."""
    rng = random.Random(2)
    prompts = [a_prompt(rng) for _ in range(8)]
    params = [WITH_LIMIT.but(seed=number) if number % 2 else FREE.but(seed=number) for number in range(8)]
    with LLM(str(tiny_dir), backend=backend, **SETTINGS) as llm:
        alone = [llm.generate(*one, use_tqdm=False)[0] for one in zip(prompts, params, strict=True)]
        assert [LIMIT in (output.error or "") for output in alone] == [False, True] * 4
        tail = llm.tokenizer.encode_inside("abcdefgh")  # that a grammar would take, and takes to the limit
        answers = [[*one.prompt_token_ids, *one.outputs[0].token_ids[:-2], *tail] for one in alone]
        answers += [[*one.prompt_token_ids, *one.outputs[0].token_ids] for one in alone]
        guesser = Guesser(answers, llm.model_config.vocab_size)
        llm._engine.scheduler._proposer = guesser
        llm._engine.step_listeners.append(guesser.note)
        for _ in range(4):
            found = llm.generate(prompts, params, use_tqdm=False)
            assert [(output.error, bits(output)) for output in found] == [(one.error, bits(one)) for one in alone]
        check_home(llm)
    assert guesser.accepted > 20 and guesser.rejected > 5


def test_a_search_says_that_a_beam_met_the_limit(tiny_dir: Path) -> None:
    """Even where other beams could go on: what they would find might not be the best."""
    search = BeamSearchParams(beam_width=6, max_tokens=60, min_tokens=60, structured_outputs=AMBIGUOUS)
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        (found,) = llm.beam_search("A", search, use_tqdm=False)
        assert "of 6 beams cannot go on: structured_outputs: " in (found.error or "") and LIMIT in (found.error or "")
        check_home(llm)
