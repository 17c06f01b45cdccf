"""Sessions through the doors: text, seeds, batches, misuse, endings. Mostly on tiny models."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.session import Branch, Session
from tests.backends.cpu.test_processes import in_fork
from tests.invariance.harness import Counts, _Watched
from tests.pace import held
from tests.sessions import coordinator_of, run_as, state_of
from tests.test_llm import check_idle, interrupt_at_step

TEXT = "the quick brown fox jumps over"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
SLOW: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


CONFIG: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512}


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), **CONFIG) as llm:
        yield llm


@pytest.fixture(scope="module", params=["cpu", "reference"])
def either(request: pytest.FixtureRequest, tiny_gemma3_dir: Path) -> Iterator[LLM]:
    """The model that both backends run, with windows and without."""
    with LLM(str(tiny_gemma3_dir), backend=request.param, **CONFIG) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does: afterwards nothing is queued and every block is home."""
    yield
    for name in {"tiny", "either"} & set(request.fixturenames):
        check_idle(request.getfixturevalue(name))


@pytest.fixture
async def llm(tiny_llama_dir: Path) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny_llama_dir), max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512)
    yield llm
    await asyncio.to_thread(llm.close)
    kv = llm._loop.engine.kv
    assert kv.num_available == kv.num_blocks


def watch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts of what steps did from here on."""
    counts = Counts()
    monkeypatch.setattr(llm._engine, "_executor", _Watched(llm._engine._executor, counts))
    return counts


def exact(llm: LLM) -> float:
    """How far log-probabilities may be apart: on `cpu`, not at all."""
    return 0.0 if llm.config.backend == "cpu" else 1e-4


# --- the real model ---


def test_the_real_model(smollm2_llm: LLM) -> None:
    """The example of the documentation, and greedy branches as plain requests."""
    with smollm2_llm.session() as s:
        s.extend("Question: Is a whale a fish or a mammal?\nAnswer: A whale is a")
        assert s.select([" fish", " mammal", " kind of tree"]).best.text == " mammal"
        a, b = s.fork(2)
        a.extend(" mammal because")
        b.extend(" large animal that")
        outputs = s.generate_all([a, b], max_tokens=12, temperature=0)
        prompts = [branch.text.removesuffix(output.text) for branch, output in zip((a, b), outputs, strict=True)]
        assert [prompt.endswith(end) for prompt, end in zip(prompts, ("because", "that"), strict=True)] == [True, True]
        plain = smollm2_llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
        assert [output.text for output in outputs] == [one.outputs[0].text for one in plain]
    check_idle(smollm2_llm)


# --- exactness ---


def test_generate_is_that_of_a_plain_request(either: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, batched and continued, with the tokens and log-probabilities of a request that begins from nothing."""
    counts = watch(either, monkeypatch)
    with either.session(seed=11) as s:
        s.extend(TEXT + "?")
        first = s.generate(**SAMPLED, logprobs=2)
        branches = s.fork(3)
        branches[1].extend(" and")
        prompts = [branch.token_ids for branch in branches]
        outputs = s.generate_all(branches, SamplingParams(**SAMPLED, logprobs=2, presence_penalty=0.5))
        for branch, prompt, output in zip(branches, prompts, outputs, strict=True):
            assert branch.token_ids == prompt + output.token_ids
    assert counts.shared > 5 and counts.copies > 0, "branches ran together over shared blocks"
    either.reset_prefix_cache()
    (plain,) = either.generate(TEXT + "?", SamplingParams(**SAMPLED, logprobs=2, seed=11))
    assert plain.outputs[0].token_ids == first.token_ids and same_logprobs(plain.outputs[0], first, exact(either))
    params = SamplingParams(**SAMPLED, logprobs=2, presence_penalty=0.5, seed=11, output_kind="final_only")
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        either.reset_prefix_cache()
        alone = run_as(either, prompt, params, stream=(number, 0))
        assert alone.outputs[0].token_ids == output.token_ids
        assert same_logprobs(alone.outputs[0], output, exact(either))


def same_logprobs(one: Any, other: Any, tolerance: float) -> bool:
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert all(abs(a[token_id].logprob - b[token_id].logprob) <= tolerance for token_id in a)
        assert [entry.decoded_token for entry in a.values()] == [entry.decoded_token for entry in b.values()]
    return True


@pytest.mark.parametrize("room", [None, 34 * 16])
def test_select_is_prompt_logprobs(either: LLM, tiny_gemma3_dir: Path, room: int | None) -> None:
    """Also in a pool in which the choices do not fit side by side."""
    if room is None:
        compare_select(either)
        return
    config: dict[str, Any] = {"backend": either.config.backend, "max_model_len": room}
    block = either.memory_plan.kv_bytes // either._engine.kv.num_blocks
    with LLM(str(tiny_gemma3_dir), **config, kv_cache_memory_bytes=block * (room // 16)) as small:
        assert small._engine.kv.num_blocks == room // 16
        compare_select(small)
        assert [event for event in small._engine.events if event.kind == "evicted"]


def compare_select(llm: LLM) -> None:
    texts = [" fox", " the lazy dog", " lazy", " lazy dog and then the other one", "!", " dog" * 60, " cat" * 60]
    with llm.session() as s:
        s.extend(TEXT * 6)
        prompt = s.token_ids
        before = llm.cache_stats.copied_blocks
        result = s.select(texts, by="total")
        assert s.token_ids == prompt and llm.cache_stats.copied_blocks > before, "forks wrote to a shared block"
    assert [choice.text for choice in result.choices] == texts
    for choice in result.choices:
        assert choice.token_ids == llm.tokenizer.encode(choice.text, add_special_tokens=False)
        whole = [*prompt, *choice.token_ids]
        (plain,) = llm.generate({"prompt_token_ids": whole}, SamplingParams(max_tokens=1, prompt_logprobs=0))
        assert plain.prompt_logprobs is not None
        rows = [row[token_id].logprob for row, token_id in zip(plain.prompt_logprobs[1:], whole[1:], strict=True)]  # type: ignore[index]
        expected = rows[len(prompt) - 1 :]
        assert len(choice.logprobs) == len(expected)
        assert all(abs(a - b) <= exact(llm) for a, b in zip(choice.logprobs, expected, strict=True))
        assert choice.total_logprob == sum(choice.logprobs)
        assert choice.mean_logprob == choice.total_logprob / len(choice.token_ids)
    assert result.best is result.best_by_total is max(result.choices, key=lambda c: c.total_logprob)
    assert result.best_by_mean is max(result.choices, key=lambda c: c.mean_logprob)


def test_a_seed_repeats_a_session(tiny: LLM) -> None:
    """Whatever else runs, and in whatever order branches are asked; two generates of one branch differ."""

    def program(seed: int | None, turned: bool) -> tuple[int, list[str]]:
        with tiny.session(seed=seed) as s:
            s.extend(TEXT)
            branches = s.fork(2)
            outputs = {}
            for index in (1, 0) if turned else (0, 1):
                outputs[index] = branches[index].generate(**SAMPLED).text
            kept = s.num_tokens
            twice = []
            for _ in range(2):
                twice.append(s.generate(**SAMPLED).text)
                s.truncate(kept)
            return s.seed, [outputs[0], outputs[1], *twice]

    seed, texts = program(None, False)
    assert len(set(texts)) == 4
    assert program(seed, True) == (seed, texts)
    assert program(seed + 1, False)[1] != texts


# --- text ---


def test_text_goes_on_as_it_was_shown(tiny: LLM) -> None:
    with tiny.session() as s:
        s.extend("")
        assert (s.text, s.num_tokens) == ("", 0)
        s.extend(TEXT)
        whole = s.generate(SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        assert s.text == TEXT + whole.text and s.token_ids[-30:] == whole.token_ids
        stop = whole.text[10:13]
        (fork,) = s.fork()
        fork.truncate(s.num_tokens - 30)
        assert fork.text == TEXT
        output = fork.generate(SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=stop))
        assert output.finish_reason == "stop" and output.text == whole.text[: whole.text.index(stop)]
        assert fork.text == TEXT + output.text
        fork.extend({"prompt_token_ids": [5, 6]})
        fork.extend({"prompt": "<|im_end|>"})
        assert fork.token_ids[-3:] == [5, 6, tiny.tokenizer.encode("<|im_end|>")[0]]
        assert fork.text.endswith("<|im_end|>")
        chosen = fork.select([" a", " b"], extend=True)
        assert fork.text.endswith("<|im_end|>" + chosen.best.text)
        assert s.text == TEXT + whole.text, "a branch of its own"


def test_a_conversation(tiny: LLM) -> None:
    """The chat template's prompt is a prompt like any other."""
    with tiny.session() as s:
        s.extend(tiny.chat_prompt([{"role": "user", "content": "hello"}]))
        output = s.generate(temperature=0, max_tokens=8)
    (plain,) = tiny.chat([{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=8))
    assert output.token_ids == plain.outputs[0].token_ids


# --- misuse ---


def dropped(session: Session) -> Branch:
    (branch,) = session.fork()
    branch.drop()
    return branch


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s: s.extend(None), "prompt"),
        (lambda s: s.extend({"prompt_token_ids": [99999]}), "prompt_token_ids"),
        (lambda s: s.extend({"prompt": "x", "cache_salt": "y"}), "cache_salt"),
        (lambda s: s.extend("\ud800"), "prompt"),
        (lambda s: s.extend("x " * 600), "prompt"),
        (lambda s: s.fork(0), "n"),
        (lambda s: s.fork(2.5), "n"),
        (lambda s: s.fork(10**6), "n"),
        (lambda s: s.truncate(-1), "num_tokens"),
        (lambda s: s.truncate(1000), "num_tokens"),
        (lambda s: s.generate(n=2), "n"),
        (lambda s: s.generate(prompt_logprobs=0), "prompt_logprobs"),
        (lambda s: s.generate(skip_reading_prefix_cache=True), "skip_reading_prefix_cache"),
        (lambda s: s.generate(temperature=-1), "temperature"),
        (lambda s: s.generate(max_token=3), "max_token"),
        (lambda s: s.generate(SamplingParams(), max_tokens=3), "sampling_params"),
        (lambda s: s.generate({"max_tokens": 3}), "sampling_params"),
        (lambda s: s.generate(logprobs=1000), "logprobs"),
        (lambda s: s.generate(max_tokens=None, min_tokens=600), "min_tokens"),
        (lambda s: s.select([]), "choices"),
        (lambda s: s.select("yes"), "choices"),
        (lambda s: s.select(["yes", ""]), "choices[1]"),
        (lambda s: s.select(["x"] * 2000), "choices"),
        (lambda s: s.select([3]), "choices[0]"),
        (lambda s: s.select(["yes", {"prompt_token_ids": [99999]}]), "choices[1].prompt_token_ids"),
        (lambda s: s.select(["yes", " x" * 600]), "choices[1]"),
        (lambda s: s.select(["yes"], by="length"), "by"),
        (lambda s: s.generate_all([s, s]), "branches"),
        (lambda s: s.generate_all(s), "branches"),
        (lambda s: s.generate_all([s], [SamplingParams()] * 2), "sampling_params"),
        (lambda s: s.generate_all([s], max_token=1), "max_token"),
        (lambda s: s.generate_all([dropped(s), s]), "branches[0]"),
        (lambda s: s.generate_all([s, *s.fork()], [SamplingParams(), SamplingParams(n=2)]), "sampling_params[1].n"),
        (lambda s: s.generate_all([s, *s.fork()], [SamplingParams(), {"max_tokens": 3}]), "sampling_params[1]"),
        (lambda s: s.generate_all([s, *s.fork()], n=2), "n"),
    ],
)
def test_bad_arguments_are_refused(tiny: LLM, call: Callable[[Any], Any], field: str) -> None:
    with tiny.session() as s:
        s.extend(TEXT)
        before = s.token_ids
        with pytest.raises(InvalidRequestError) as caught:
            call(s)
        assert caught.value.field == field
        assert s.token_ids == before
        assert s.generate(max_tokens=2, ignore_eos=True).finish_reason == "length", "and it goes on"


def test_what_has_ended_cannot_be_used(tiny: LLM) -> None:
    with tiny.session() as s, tiny.session() as other:
        for verb in (s.generate, lambda: s.select(["x"])):
            with pytest.raises(InvalidRequestError, match="branch: is empty"):
                verb()
        s.extend(TEXT)
        other.extend(TEXT)
        with pytest.raises(InvalidRequestError, match="of another session"):
            s.generate_all([s, other])
        (fork,) = s.fork()
        fork.drop()
        with pytest.raises(InvalidRequestError, match="branch: was dropped"):
            fork.generate()
        assert fork.text == TEXT, "what it held can still be read"
    for verb in (lambda: s.extend("x"), s.generate, lambda: s.select(["x"]), s.fork):
        with pytest.raises(InvalidRequestError, match="session: is closed"):
            verb()
    s.close()
    s.drop()


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": "x"}, {"priority": 1}, {"priority": "a"}, {"cache_salt": ""}])
def test_bad_sessions_are_refused(tiny: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(given))):
        tiny.session(**given)


def test_a_full_branch(tiny: LLM) -> None:
    with tiny.session() as s:
        s.extend({"prompt_token_ids": [5] * 510})
        assert s.generate(ignore_eos=True).finish_reason == "length"
        assert s.num_tokens == 512
        for verb in (s.generate, lambda: s.extend("x"), lambda: s.select(["x"])):
            with pytest.raises(InvalidRequestError, match="max_model_len=512"):
                verb()
        s.truncate(100)
        assert s.generate(max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_parameters_that_rule_out_every_token(tiny: LLM) -> None:
    """Found out in the middle of a step: the call fails, the branch is as before, its neighbour does not notice."""
    with tiny.session(seed=1) as s:
        s.extend(TEXT)
        left, right = s.fork(2)
        impossible = SamplingParams(allowed_token_ids=[2], min_tokens=3)
        fine = SamplingParams(**SAMPLED)
        with pytest.raises(RequestFailedError, match="no token can be drawn"):
            s.generate_all([left, right], [impossible, fine])
        assert left.text == TEXT and right.num_tokens == left.num_tokens + 12
        assert left.generate(fine).token_ids


# --- life ---


def test_forgotten_sessions_and_branches_free_their_blocks(tiny: LLM) -> None:
    s = tiny.session()
    s.extend(TEXT)
    branches = s.fork(3)
    s.generate_all(branches, **SAMPLED)
    coordinator = coordinator_of(s)
    assert len(coordinator.sequences) == 4
    del branches[1:]
    gc.collect()
    s.extend("x")
    assert len(coordinator.sequences) == 2
    del s
    gc.collect()
    branches[0].extend("x")
    assert len(coordinator.sequences) == 1 and tiny._engine.num_requests == 1, "a branch keeps the session"
    del branches
    gc.collect()
    tiny.generate(TEXT, SamplingParams(max_tokens=1))
    check_idle(tiny)


def test_a_session_forgotten_in_the_middle_of_a_step(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalizers run anywhere, also in the thread that holds the engine: what they ask for has to wait."""
    held = [tiny.session()]
    held[0].extend(TEXT)
    run = tiny._engine._executor._runner.run  # type: ignore[attr-defined]

    def forgetting(plan: Any) -> Any:
        held.clear()
        gc.collect()
        assert tiny._engine.num_requests == 2 and tiny._loop._commands.qsize() == 2, "its root, and itself"
        monkeypatch.undo()
        return run(plan)

    monkeypatch.setattr(tiny._engine._executor._runner, "run", forgetting)  # type: ignore[attr-defined]
    tiny.generate(TEXT, SamplingParams(max_tokens=2, ignore_eos=True))
    check_idle(tiny)


def test_threads_share_a_batch(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny.session(seed=2) as s:
        s.extend(TEXT)
        expected = [output.text for output in s.generate_all(s.fork(4), **SAMPLED | {"max_tokens": 60})]
    counts = watch(tiny, monkeypatch)
    with tiny.session(seed=2) as s:
        s.extend(TEXT)
        branches = s.fork(4)
        texts = [""] * 4

        def work(index: int) -> None:
            texts[index] = branches[index].generate(**SAMPLED | {"max_tokens": 60}).text

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        with held(tiny._engine, lambda: all(state_of(branch).task is not None for branch in branches)):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert texts == expected
    assert counts.shared > 0, "no step had two of them"


def test_one_branch_in_two_threads(tiny: LLM) -> None:
    """And close, from a third, ends what runs."""
    s = tiny.session()
    s.extend(TEXT)
    failed: list[Exception] = []

    def work() -> None:
        try:
            s.generate(**SLOW)
        except EngineClosedError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    with held(tiny._engine, lambda: False, after=20):
        thread.start()
        while state_of(s).sequence.num_tokens <= len(tiny.tokenizer.encode(TEXT)):
            time.sleep(0.001)
        assert s.num_tokens == len(tiny.tokenizer.encode(TEXT)), "what is under way does not show"
        for verb in (lambda: s.extend("x"), s.generate, s.fork):
            with pytest.raises(InvalidRequestError, match="branch: is at work on another call"):
                verb()
        s.close()
        thread.join()
    assert len(failed) == 1 and "closed" in str(failed[0])


def test_an_interrupt_ends_the_calls(tiny: LLM) -> None:
    with tiny.session() as s:
        s.extend(TEXT)
        branches = s.fork(2)
        with interrupt_at_step(tiny, 1), pytest.raises(KeyboardInterrupt):
            s.generate_all(branches, **SLOW)
        assert s.generate_all(branches, max_tokens=1)
        assert [branch.text.startswith(TEXT) for branch in branches] == [True] * 2
        assert [branch.num_tokens for branch in branches] == [s.num_tokens + 1] * 2


def test_closing_the_llm_ends_sessions(tiny_llama_dir: Path) -> None:
    llm = LLM(str(tiny_llama_dir), max_model_len=512)
    s = llm.session()
    s.extend(TEXT)
    llm.close()
    for verb in (lambda: s.extend("x"), s.generate, s.fork, llm.session):
        with pytest.raises(EngineClosedError):
            verb()
    s.close()
    kv = llm._engine.kv
    assert kv.num_available == kv.num_blocks


# --- asyncio ---


async def test_async_branches_run_together(llm: AsyncLLM, tiny_llama_dir: Path) -> None:
    with LLM(str(tiny_llama_dir), max_model_len=512) as sync, sync.session(seed=4) as expected:
        expected.extend(TEXT)
        texts = [output.text for output in expected.generate_all(expected.fork(3), **SAMPLED)]
        selected = expected.select([" the", " dog and"], extend=True)
        whole = expected.text
    engine = llm._loop.engine
    async with llm.session(seed=4) as s:
        await s.extend(TEXT)
        branches = await s.fork(3)
        before = engine.num_steps
        outputs = await asyncio.gather(*(branch.generate(**SAMPLED) for branch in branches))
        assert [output.text for output in outputs] == texts
        assert engine.num_steps - before < 30, "36 tokens"
        assert await s.select([" the", " dog and"], extend=True) == selected
        assert s.text == whole
        await branches[0].drop()
        await branches[1].truncate(2)
        assert branches[1].num_tokens == 2
    with pytest.raises(InvalidRequestError, match="session: is closed"):
        await s.extend("x")


async def test_async_text_is_computed_ahead_and_then_nothing_runs(llm: AsyncLLM) -> None:
    """Guards an engine thread that spins while a session is idle."""
    async with llm.session() as s:
        await s.extend(TEXT)
        sequence = state_of(s).sequence
        assert sequence is not None
        while llm._loop.engine.has_unfinished_requests:
            await asyncio.sleep(0.005)
        assert sequence.num_computed == s.num_tokens - 1
        step, calls = llm._loop.engine.step, []
        llm._loop.engine.step = lambda: calls.append(1) or step()  # type: ignore[method-assign,func-returns-value]
        await asyncio.sleep(0.1)
        assert not calls
        assert (await s.generate(max_tokens=2, ignore_eos=True)).token_ids


async def test_async_cancelling_restores_the_branch(llm: AsyncLLM) -> None:
    async with llm.session() as s:
        await s.extend(TEXT)
        length = s.num_tokens
        with held(llm._loop.engine, lambda: False, after=20):
            task = asyncio.create_task(s.generate(**SLOW))
            while state_of(s).sequence.num_tokens == length:
                await asyncio.sleep(0.001)
            assert s.num_tokens == length, "what is under way does not show"
            with pytest.raises(InvalidRequestError, match="branch: is at work on another call"):
                await s.extend("x")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await s.generate(max_tokens=3, ignore_eos=True)).token_ids
        assert s.text.startswith(TEXT) and s.num_tokens == length + 3


async def test_async_endings(llm: AsyncLLM) -> None:
    """A forgotten session frees its blocks by itself; a closed engine tells whoever waits."""
    forgotten = llm.session()
    await forgotten.extend(TEXT)
    await forgotten.generate(max_tokens=2)
    del forgotten
    gc.collect()
    while llm.num_unfinished_requests:
        await asyncio.sleep(0.001)
    kv = llm._loop.engine.kv
    assert kv.num_available == kv.num_blocks
    s = llm.session()
    await s.extend(TEXT)
    left, right = await s.fork(2)
    tasks = [asyncio.create_task(left.generate(**SLOW)), asyncio.create_task(right.select([" x" * 100, " y"]))]
    while state_of(left).sequence.num_tokens == s.num_tokens:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(llm.close)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], EngineClosedError)
    with pytest.raises(EngineClosedError):
        await s.extend("x")
    await s.close()


def test_a_branch_is_a_branch(tiny: LLM) -> None:
    with tiny.session() as s:
        assert isinstance(s, Branch) and type(s.fork()[0]) is Branch


def test_a_fork_of_the_process_frees_branches(tiny: LLM) -> None:
    """In the child, where nobody is at work on them; the parent's goes on."""
    with tiny.session(seed=1) as s, tiny.session(seed=1) as other:
        for one in (s, other):
            one.extend(TEXT)
        (expected,) = other.generate_all([other], **SAMPLED)
        thread = threading.Thread(target=lambda: s.generate(**SLOW))
        thread.start()
        while state_of(s).task is None or not s._in_use.locked():
            time.sleep(0.001)

        def work() -> None:
            assert s.num_tokens == len(tiny.tokenizer.encode(TEXT))
            assert s.generate(**SAMPLED).token_ids == expected.token_ids

        in_fork(work)
        thread.join()
        assert s.num_tokens == len(tiny.tokenizer.encode(TEXT)) + SLOW["max_tokens"]


def test_a_fork_of_the_process_takes_back_what_nobody_heard_of(tiny: LLM) -> None:
    """A call was carried out, and its caller, a thread of the parent, had not heard: in the child it never was."""
    with tiny.session(seed=1) as s, tiny.session(seed=1) as other:
        for one in (s, other):
            one.extend(TEXT)
        (expected,) = other.generate_all([other], **SAMPLED)
        held = s.token_ids
        with s._alone() as calls:
            s._do(s._generating(SamplingParams(**SAMPLED)), calls).result(20)
            assert state_of(s).num_tokens == len(held) + len(expected.token_ids)

            def work() -> None:
                assert s.token_ids == held
                assert s.generate(**SAMPLED).token_ids == expected.token_ids
                assert s.token_ids == held + expected.token_ids

            in_fork(work)
            s._client.take_back(calls).result(20)
        assert s.generate(**SAMPLED).token_ids == expected.token_ids
