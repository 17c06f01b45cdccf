"""Questions over documents beside what they meet: windows of layers, types of KV, files, priority, searches, samples,
forks of the process, callers who go away. Each answer is that of the same question alone."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AskParams, BeamSearchParams, EngineClosedError, MarginsParams, SamplingParams
from tests.pace import held
from tests.test_ask import facts
from tests.test_margins import a_document
from tests.test_margins_pairs import check_home, folder, gave_way, scarce, together

__all__ = ["folder"]  # fixtures

SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1000}
DRAWN = SamplingParams(temperature=0.9, max_tokens=9)
WORDS = ["whale", "captain", "sea", "sails", "old", "white"]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.md").write_text(f"# Part {number}\n\n{a_document(number, 8)}\n")
    return folder


def a_question(rng: random.Random) -> tuple[str, AskParams]:
    """A function of the numbers alone."""
    given: dict[str, Any] = {"seed": rng.randrange(100), "num_passages": rng.randint(1, 4), "passage_tokens": 64}
    structured = rng.choice([None, {"choice": ["Yes [1].", "No [2]."]}, {"regex": "[a-z]{3,9}\\."}])
    given["answer"] = DRAWN.but(max_tokens=rng.randint(1, 20), structured_outputs=structured)
    if rng.random() < 0.4:
        given["num_documents"] = rng.randint(1, 3)
        kind = rng.choice(["score", "text", "merged"])
        lowest = {"threshold": -1e6} if kind == "score" else {}
        given["margins"] = MarginsParams(segment_tokens=90, margin=DRAWN, classification=kind, **lowest)
    return f"Where is the {rng.choice(WORDS)} {rng.choice(WORDS)}?", AskParams(**given)


def leave(llm: LLM, docs: Path, rng: random.Random) -> None:
    for _ in range(5):
        question, params = a_question(rng)
        with llm.stream_ask(question, docs, params) as run:
            for _, _ in zip(range(rng.randint(0, 12)), run, strict=False):
                pass


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_storm(folder: Path, docs: Path, tmp_path: Path, seed: int, kv_cache_dtype: str) -> None:
    """In a pool that holds one context, with blocks in files, beside a search, samples, embeddings and callers who go
    away; the second time with a cache that is warm."""
    rng = random.Random(seed)
    asked = [a_question(rng) for _ in range(8)]
    search = BeamSearchParams(beam_width=3, max_tokens=8, structured_outputs={"choice": ["aye", "nay"]})

    def beside(llm: LLM) -> list[Any]:
        beams = llm.beam_search("The whale " * 20, search, use_tqdm=False)[0].outputs
        samples = llm.generate("The sea " * 110, DRAWN.but(n=3, seed=2), use_tqdm=False)[0].outputs
        embedded = llm.embed(["The sea " * 40, "A"], use_tqdm=False)
        return [one.token_ids for one in [*beams, *samples]] + [one.outputs.embedding for one in embedded]

    settings = SETTINGS | {"kv_cache_dtype": kv_cache_dtype}
    with LLM(str(folder), **settings) as llm:
        alone: dict[Any, Any] = {}
        for number, (question, params) in enumerate(asked):
            alone[number] = facts(llm.ask(question, docs, params))
            llm.reset_prefix_cache()
        alone["beside"] = beside(llm)
        settings |= scarce(llm, 1000) | {"kv_offload_dir": str(tmp_path / "kv")}
    with LLM(str(folder), **settings) as llm:
        for _ in range(2):
            found: dict[Any, Any] = {}

            def work(first: int) -> None:
                for number in range(first, len(asked), 4):
                    found[number] = facts(llm.ask(asked[number][0], docs, asked[number][1]))  # noqa: B023

            works: list[Callable[[], None]] = [lambda first=first: work(first) for first in range(4)]  # type: ignore[misc]
            works.append(lambda: found.update({"beside": beside(llm)}))  # noqa: B023
            with held(llm._engine, lambda: llm._engine.num_requests >= 4):
                together(*works, lambda: leave(llm, docs, random.Random(seed)))
            assert found == alone
        assert gave_way(llm), "the pool was large enough for all"
        check_home(llm)


def test_priority(tiny_dir: Path, docs: Path) -> None:
    rng = random.Random(3)
    asked = [a_question(rng) for _ in range(4)]
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        alone = [facts(llm.ask(question, docs, params)) for question, params in asked]
        settings = SETTINGS | scarce(llm, 1000) | {"scheduling_policy": "priority"}
    urgent = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    with LLM(str(tiny_dir), **settings) as llm:
        found: list[Any] = []

        def press() -> None:
            for number in range(8):
                llm.generate(["sea " * 150 + str(number)] * 2, urgent, priority=-1, use_tqdm=False)

        def ask_all() -> None:
            for question, params in asked:
                found.append(facts(llm.ask(question, docs, params, priority=5)))

        together(ask_all, press)
        assert found == alone
        check_home(llm)


def test_a_fork_of_the_process(tiny_dir: Path, docs: Path) -> None:
    """A question goes on in the parent and is ended in the child, which can ask others of the same index."""
    question, params = a_question(random.Random(0))
    params = params.but(answer=DRAWN.but(max_tokens=40, ignore_eos=True))
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        alone = facts(llm.ask(question, docs, params))
        forked: list[int] = []
        with held(llm._engine, lambda: bool(forked), after=20):  # of the 40 steps and more that an answer takes
            run = llm.stream_ask(question, docs, params)
            for event in run:
                if type(event).__name__ == "AnswerBegun":
                    break
            next(run)  # under way
            child = os.fork()
            forked.append(child)
        if child == 0:
            code = 1
            try:
                with pytest.raises(EngineClosedError):
                    run.result()
                if facts(llm.ask(question, docs, params)) == alone:
                    check_home(llm)
                    code = 0
            except BaseException:
                traceback.print_exc()  # nobody else tells of it
            finally:
                os._exit(code)
        assert facts(run.result()) == alone
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check_home(llm)
