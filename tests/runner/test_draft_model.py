"""A model that guesses for itself is always right: so whatever it reads wrongly, or not at all, shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, ConfigError, RequestOutput, SamplingParams
from octavo.core.events import EventKind
from octavo.core.plan import StepPlan, StepResult, accepted_drafts
from octavo.core.want import Counts, Draw, History
from octavo.runner.draft_model import after

SETTINGS: dict[str, Any] = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 48}
SIZE = 3
WORDS = "the quick brown fox jumps over the lazy dog "


def guessing(path: Path, **settings: Any) -> LLM:
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": SIZE, "adaptive": False}
    return LLM(str(path), **(SETTINGS | settings), speculative_config=config)


class Watch:
    """Guesses, and those that were wrong."""

    def __init__(self, llm: LLM) -> None:
        self.right = self.wrong = 0
        llm._engine.step_listeners.append(self)

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        for grant, one in zip(plan.grants, result.results, strict=True):
            accepted = len(accepted_drafts(grant, one.rows))
            self.right += accepted
            self.wrong += grant.num_drafts - accepted


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [one.token_ids for output in outputs for one in output.outputs]


PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=4, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=5, presence_penalty=0.5, repetition_penalty=1.2, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=6, n=3, max_tokens=30, ignore_eos=True),
]


@pytest.fixture(scope="module", params=["tiny_dir", "tiny_gemma3_dir"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def plain(path: Path) -> list[list[int]]:
    with LLM(str(path), **SETTINGS) as llm:
        return tokens([llm.generate(WORDS, one)[0] for one in PARAMS])


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with guessing(path) as llm:
        yield llm


def test_every_guess_comes_true(llm: LLM, plain: list[list[int]]) -> None:
    """Drawn with the noise of the request, also with penalties, beside others, and from what is cached."""
    watch = Watch(llm)
    for number in range(3):
        assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == plain
        assert watch.right > 100 * (number + 1) and not watch.wrong
    (alone,) = llm.generate(WORDS, PARAMS[0])
    # The prompt's row gives one, the next step guesses for the first time, and then each gives four.
    assert alone.metrics.num_accepted_tokens >= 20
    stats = llm.speculation_stats
    assert stats is not None and stats.tokens_per_step > 3


def test_in_scarce_memory(path: Path, plain: list[list[int]]) -> None:
    """What was preempted is read again; nobody is preempted for the sake of a guess."""
    with guessing(path) as llm:
        block_bytes = llm.memory_plan.block_bytes
    with LLM(str(path), **SETTINGS) as llm:
        assert llm.memory_plan.block_bytes * 2 == block_bytes, "K and V of both models lie in a block"
    with guessing(path, kv_cache_memory_bytes=12 * block_bytes) as llm:
        watch = Watch(llm)
        for _ in range(2):
            assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == plain
        assert llm._engine.events.of(EventKind.PREEMPTED)
        llm.reset_prefix_cache()
        assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    assert watch.right > 50 and not watch.wrong


def test_blocks_from_files(path: Path, tmp_path: Path, plain: list[list[int]]) -> None:
    for _ in range(2):
        with guessing(path, kv_offload_dir=str(tmp_path)) as llm:
            watch = Watch(llm)
            assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == plain
            assert watch.right > 100 and not watch.wrong


def test_a_session_that_goes_back(path: Path) -> None:
    """Tokens that were taken back are not read on."""

    def answers(llm: LLM) -> list[list[int]]:
        with llm.session(seed=9) as session:
            session.extend(WORDS)
            first = session.generate(PARAMS[0].but(max_tokens=20))
            (fork,) = session.fork()
            fork.truncate(len(fork.token_ids) - 12)
            fork.extend("and then")
            second = fork.generate(PARAMS[0].but(max_tokens=20))
            third = session.generate(PARAMS[0].but(max_tokens=20))
            return [list(one.token_ids) for one in (first, second, third)]

    with LLM(str(path), **SETTINGS) as llm:
        expected = answers(llm)
    with guessing(path) as llm:
        watch = Watch(llm)
        assert answers(llm) == expected
    assert watch.right > 30 and not watch.wrong


def test_a_draft_model_that_raises_fails_nobody(llm: LLM, plain: list[list[int]]) -> None:
    runner = llm._engine._executor._runner  # type: ignore[attr-defined]
    drafter, calls = runner._drafter, 0
    run = drafter.runner.run

    def broken(plan: StepPlan) -> StepResult:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("no luck")
        return run(plan)

    drafter.runner.run = broken
    assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == plain
    assert calls > 3


def test_another_model_is_mostly_wrong_and_changes_nothing(tiny_dir: Path, tiny_gemma3_dir: Path) -> None:
    with LLM(str(tiny_gemma3_dir), **SETTINGS) as llm:
        expected = tokens(llm.generate([WORDS] * len(PARAMS), PARAMS))
    config = {"method": "draft_model", "model": str(tiny_dir), "adaptive": False}
    with LLM(str(tiny_gemma3_dir), **SETTINGS, speculative_config=config) as llm:
        watch = Watch(llm)
        assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == expected
    assert watch.wrong > watch.right


def test_models_that_do_not_fit_are_refused(tiny_dir: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.model: "):
        LLM(str(tiny_dir), **SETTINGS, speculative_config={"method": "draft_model", "model": str(tiny_llama_dir)})
    with pytest.raises(ConfigError, match=r"speculative_config\.model: is missing"):
        LLM(str(tiny_dir), **SETTINGS, speculative_config={"method": "draft_model"})
    with pytest.raises(ConfigError, match=r"speculative_config\.model: has no effect"):
        LLM(str(tiny_dir), **SETTINGS, speculative_config={"method": "ngram", "model": str(tiny_dir)})


def test_the_next_draw() -> None:
    draw = Draw(SamplingParams(), 1, (0,), 2)
    assert after(draw, 5) is draw
    counts = Counts(frozenset([1]), ((5, 1),))
    following = after(draw._replace(history=History((3,), (1, 5), counts)), 5)
    assert following.history == History((), (1, 5, 5), Counts(frozenset([1]), ((5, 2),)))
    assert after(draw._replace(history=History((3,))), 5).history is None
