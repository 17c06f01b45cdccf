"""The asynchronous front door, on the tiny model: concurrency, cancelling, aborting, closing."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams, async_llm
from octavo.async_llm import AsyncLLM
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.core.events import Event, EventKind, Reason
from octavo.core.outputs import RequestOutput, joined_outputs
from tests.pace import held
from tests.test_margins_pairs import gave_way, scarce, together

PROMPT = "the quick brown fox"


@pytest.fixture
async def llm(tiny_llama_dir: Path) -> AsyncIterator[AsyncLLM]:
    """Small enough that requests wait and are preempted: 8 places, blocks for one request of full length."""
    llm = AsyncLLM(str(tiny_llama_dir), max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512)
    yield llm
    await asyncio.to_thread(llm.close)
    kv = llm._loop.engine.kv
    assert kv.num_available == kv.num_blocks


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "seed": 7, "ignore_eos": True, **given})


LONG = params(max_tokens=480)


async def last(llm: AsyncLLM, prompt: Any, sampling: SamplingParams, request_id: str | None = None) -> RequestOutput:
    *_, output = [output async for output in llm.generate(prompt, sampling, request_id)]
    assert output.finished
    return output


async def until_idle(llm: AsyncLLM) -> None:
    """Aborts are carried out between steps: wait for them, but not until the request ends by itself (480 steps)."""
    engine = llm._loop.engine
    last_step = engine.num_steps + 100
    while llm.num_unfinished_requests or engine.kv.num_available < engine.kv.num_blocks:
        assert engine.num_steps < last_step, "blocks did not come home"
        await asyncio.sleep(0.001)


async def test_many_at_once_answer_as_alone(llm: AsyncLLM, tiny_llama_dir: Path) -> None:
    """Guards outputs given to the wrong waiter; three times as many requests as places."""
    prompts = [PROMPT + "!" * n for n in range(24)]
    with LLM(str(tiny_llama_dir), max_model_len=512) as sync:
        expected = [sync.generate(p, params(seed=n))[0].outputs[0] for n, p in enumerate(prompts)]
    got = await asyncio.gather(*(last(llm, p, params(seed=n)) for n, p in enumerate(prompts)))
    assert [output.outputs[0] for output in got] == expected
    assert [output.prompt for output in got] == prompts


async def test_outputs_come_as_tokens_do(llm: AsyncLLM) -> None:
    kinds: dict[str, list[RequestOutput]] = {}
    for kind in ("cumulative", "delta", "final_only"):
        await llm.reset_prefix_cache()  # what is cached of the prompt differs by rounding on this backend
        kinds[kind] = [o async for o in llm.generate(PROMPT, params(output_kind=kind, logprobs=1))]
    whole = kinds["final_only"][0].outputs[0]
    assert [len(outputs) for outputs in kinds.values()] == [12, 12, 1]
    assert kinds["cumulative"][-1].outputs[0] == whole
    assert "".join(o.outputs[0].text for o in kinds["delta"]) == whole.text
    assert whole.logprobs is not None
    assert all(entry.decoded_token is not None for row in whole.logprobs for entry in row.values())


async def test_requests_run_side_by_side(llm: AsyncLLM) -> None:
    """Guards a loop that serves one after the other: a short request ends while a long one is under way."""
    engine = llm._loop.engine
    with held(engine, lambda: engine.num_requests == 2):
        long, short = await asyncio.gather(last(llm, PROMPT, LONG), last(llm, PROMPT, params()))
    assert len(long.outputs[0].token_ids) == 480
    assert short.metrics.finished_time is not None and long.metrics.finished_time is not None
    assert short.metrics.finished_time < long.metrics.finished_time


async def test_cancelling_frees_blocks(llm: AsyncLLM) -> None:
    with held(llm._loop.engine, lambda: False, after=20):
        task = asyncio.create_task(last(llm, PROMPT, LONG))
        while llm._loop.engine.kv.num_available == llm._loop.engine.kv.num_blocks:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(llm)


async def test_leaving_the_loop_frees_blocks(llm: AsyncLLM) -> None:
    with held(llm._loop.engine, lambda: False, after=20):
        async for _ in llm.generate(PROMPT, LONG):
            break
        await until_idle(llm)
    with held(llm._loop.engine, lambda: False, after=20):
        answer = llm.chat([{"role": "user", "content": "hi"}], LONG)
        await anext(answer)
        await answer.aclose()
        await until_idle(llm)


async def test_abort_ends_with_a_last_output(llm: AsyncLLM) -> None:
    outputs = []
    with held(llm._loop.engine, lambda: False, after=20):
        async for output in llm.generate(PROMPT, LONG, "mine"):
            outputs.append(output)
            if len(outputs) == 3:
                await llm.abort("mine")
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) < 480
    await until_idle(llm)
    await llm.abort("mine")  # ended already: nothing to do
    await llm.abort("never there")


async def test_abort_of_a_waiting_request(llm: AsyncLLM) -> None:
    with held(llm._loop.engine, lambda: False, after=20):
        running = [asyncio.create_task(last(llm, PROMPT, LONG)) for _ in range(8)]
        while llm.num_unfinished_requests < 8:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(last(llm, PROMPT, params(), "waits"))
        while llm.num_unfinished_requests < 9:
            await asyncio.sleep(0.001)
        await llm.abort("waits")
        output = await waiting
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("abort", [])
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await until_idle(llm)


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(llm: AsyncLLM) -> None:
    expected = (await last(llm, PROMPT, LONG)).outputs[0].token_ids
    refused = threading.Event()
    with held(llm._loop.engine, refused.is_set, after=20):
        first = asyncio.create_task(last(llm, PROMPT, LONG, "same"))
        while not llm.num_unfinished_requests:
            await asyncio.sleep(0.001)
        with pytest.raises(InvalidRequestError, match="request_id: 'same' is in use"):
            await last(llm, PROMPT, params(), "same")
        refused.set()
        output = await first
    assert (output.request_id, output.outputs[0].token_ids) == ("same", expected)
    assert (await last(llm, PROMPT, params(), "same")).request_id == "same", "free again"


async def test_cancelling_a_refused_request_spares_the_owner_of_its_id(llm: AsyncLLM) -> None:
    """Guards an abort by id alone: the second's clean-up would end the first."""
    cancelled = threading.Event()
    with held(llm._loop.engine, cancelled.is_set, after=20):
        first = asyncio.create_task(last(llm, PROMPT, LONG, "same"))
        while not llm.num_unfinished_requests:
            await asyncio.sleep(0.001)
        for pause in range(20):
            second = asyncio.create_task(last(llm, PROMPT, params(), "same"))
            await asyncio.sleep(pause / 4000)  # whatever it is by then, ending it must not end the first
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        cancelled.set()
        assert (await first).outputs[0].finish_reason == "length"


@pytest.mark.parametrize("request_id", ["", 5, b"x", ["x"]])
async def test_bad_request_ids(llm: AsyncLLM, request_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        await last(llm, PROMPT, params(), request_id)


@pytest.mark.parametrize("prompt", ["", "x " * 600, {"prompt_token_ids": [10**6]}, 5])
async def test_bad_prompts_leave_nothing(llm: AsyncLLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        await last(llm, prompt, params())
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        await last(llm, PROMPT, {"temperature": 0})  # type: ignore[arg-type]
    assert llm.num_unfinished_requests == 0


async def test_closing_tells_everybody_who_waits(tiny_llama_dir: Path) -> None:
    """Guards waiters that hang: running, queued, and asking just as the engine goes."""
    llm = AsyncLLM(str(tiny_llama_dir), max_num_seqs=2, max_model_len=512)
    with held(llm._loop.engine, lambda: False, after=20):
        tasks = [asyncio.create_task(last(llm, PROMPT, LONG)) for _ in range(6)]
        while llm.num_unfinished_requests < 6:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(last(llm, PROMPT, LONG)) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncio.to_thread(llm.close)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineClosedError] * 12
    with pytest.raises(EngineClosedError):
        await last(llm, PROMPT, params())
    await llm.abort("x")
    llm.close()
    assert not llm._loop.thread.is_alive()
    kv = llm._loop.engine.kv
    assert kv.num_available == kv.num_blocks


@pytest.mark.parametrize("ends", [False, True])
async def test_an_engine_that_fails_tells_everybody(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """Guards waiters that hang when the engine's own bookkeeping fails, those who ask in that moment included. The
    engine goes on; only if it cannot even end its requests (`ends`) it is closed."""
    step, in_step, go_on = llm._loop.engine.step, threading.Event(), threading.Event()

    def dying() -> list[RequestOutput]:
        if llm._loop.engine.num_steps < 3:
            return step()
        in_step.set()
        go_on.wait()
        raise AssertionError("a block is lost")

    def broken(error: str) -> list[RequestOutput]:
        raise AssertionError(error)

    expected = (await last(llm, PROMPT, params())).outputs[0].token_ids
    llm._loop.engine.num_steps = 0
    monkeypatch.setattr(llm._loop.engine, "step", dying)
    if ends:
        monkeypatch.setattr(llm._loop.engine, "end_all", broken)
    tasks = [asyncio.create_task(last(llm, PROMPT, LONG)) for _ in range(3)]
    await asyncio.to_thread(in_step.wait)
    late = asyncio.create_task(last(llm, PROMPT, LONG))
    while llm._loop._commands.empty():
        await asyncio.sleep(0.001)
    go_on.set()
    results = await asyncio.gather(*tasks, late, return_exceptions=True)
    assert [type(result) for result in results] == [EngineClosedError if ends else RequestFailedError] * 4
    assert "a block is lost" in str(results[0])
    monkeypatch.setattr(llm._loop.engine, "step", step)
    if ends:
        with pytest.raises(EngineClosedError):
            await last(llm, PROMPT, params())
    else:
        assert (await last(llm, PROMPT, params())).outputs[0].token_ids == expected


async def test_a_failed_request_raises_and_the_others_go_on(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (await last(llm, PROMPT, params())).outputs[0].token_ids
    ops = llm._loop.engine._executor._runner._ops  # type: ignore[attr-defined]
    sample = ops.sample

    def failing(logits: Any, requests: Any) -> Any:
        if any(request.want.draws[0].seed == 666 for request in requests):
            raise ArithmeticError("bad row")
        return sample(logits, requests)

    monkeypatch.setattr(ops, "sample", failing)
    good, bad = await asyncio.gather(
        last(llm, PROMPT, params()), last(llm, PROMPT, params(seed=666)), return_exceptions=True
    )
    assert isinstance(good, RequestOutput) and good.outputs[0].token_ids == expected
    assert isinstance(bad, RequestFailedError) and "bad row" in str(bad)


async def test_a_forgotten_engine_ends_its_thread(tiny_llama_dir: Path) -> None:
    """Guards a leak of thread and model when nobody calls close()."""
    llm = AsyncLLM(str(tiny_llama_dir))
    await last(llm, PROMPT, params())
    thread = llm._loop.thread
    del llm
    gc.collect()
    await asyncio.to_thread(thread.join)
    assert not thread.is_alive()


def test_several_event_loops(tiny_llama_dir: Path) -> None:
    """Guards outputs delivered on the wrong loop."""
    llm = AsyncLLM(str(tiny_llama_dir))
    got: dict[int, list[int]] = {}

    def work(seed: int) -> None:
        got[seed] = asyncio.run(last(llm, PROMPT, params(seed=seed, max_tokens=60))).outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with LLM(str(tiny_llama_dir)) as sync:
        expected = {s: sync.generate(PROMPT, params(seed=s, max_tokens=60))[0].outputs[0].token_ids for s in range(4)}
    assert got == expected
    llm.close()


@pytest.mark.parametrize("is_closed_at_once", [False, True])
def test_an_event_loop_that_is_closed_is_forgotten(tiny_llama_dir: Path, is_closed_at_once: bool) -> None:
    """With all that came for it and that nobody took: a program may have one loop after the other."""
    llm = AsyncLLM(str(tiny_llama_dir))
    engine = llm._loop.engine
    forgotten: list[weakref.ref[Any]] = []
    for _ in range(5):
        loop = asyncio.new_event_loop()

        async def begin(answer: Any) -> None:
            await anext(answer)

        answers = [llm.generate(PROMPT, params(max_tokens=60, seed=seed)) for seed in range(3)]
        for answer in answers:
            loop.run_until_complete(begin(answer))
        steps = engine.num_steps
        while not is_closed_at_once and llm.num_unfinished_requests and engine.num_steps < steps + 10:
            time.sleep(0.001)  # meanwhile outputs come, and wait for the loop
        forgotten.append(weakref.ref(loop))
        loop.close()
        del loop, answer, answers
    gc.collect()
    assert asyncio.run(last(llm, PROMPT, params())).finished
    while llm.num_unfinished_requests:
        time.sleep(0.001)
    llm._loop.ask(lambda engine: None).result()  # what came last was handed out
    gc.collect()
    assert [one() for one in forgotten] == [None] * 5
    llm.close()


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_event_loops_that_come_and_go(tiny_gemma3_dir: Path, tmp_path: Path, kv_cache_dtype: str) -> None:
    """Several at a time over one engine whose pool is too small, each with callers who stay, who go away and who are
    left behind as their loop is closed: nothing that comes is lost, or another's."""
    rng = random.Random(8)
    settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "kv_cache_dtype": kv_cache_dtype}
    prompts = [PROMPT * rng.randint(1, 6) + str(number) for number in range(24)]
    sampling = [params(seed=n, n=rng.choice([1, 1, 3]), max_tokens=rng.randint(5, 40), logprobs=1) for n in range(24)]
    with LLM(str(tiny_gemma3_dir), max_model_len=256, enable_prefix_caching=False, **settings) as sync:
        alone = [sync.generate(p, s, use_tqdm=False)[0].outputs for p, s in zip(prompts, sampling, strict=True)]
        settings |= scarce(sync, 256) | {"kv_offload_dir": str(tmp_path / "kv")}
    llm = AsyncLLM(str(tiny_gemma3_dir), **settings)
    found: dict[int, Any] = {}

    async def stay(number: int) -> None:
        pieces: dict[int, list[Any]] = {}
        async for output in llm.generate(prompts[number], sampling[number].but(output_kind="delta")):
            for one in output.outputs:
                pieces.setdefault(one.index, []).append(one)
        joined = [reduce(joined_outputs, pieces[index]) for index in sorted(pieces)]
        found[number] = [(one.text, one.token_ids, one.logprobs, one.finish_reason) for one in joined]

    async def leave(number: int, outputs: int) -> None:
        answer = llm.generate(prompts[number], sampling[number].but(output_kind="delta"))
        async for _ in answer:
            outputs -= 1
            if outputs <= 0:
                break
        await answer.aclose()

    async def be_cancelled(number: int, outputs: int) -> None:
        heard = asyncio.Event()

        async def hear() -> None:
            count = 0
            async for _ in llm.generate(prompts[number], sampling[number].but(output_kind="delta")):
                count += 1
                if count >= outputs:
                    heard.set()
            heard.set()

        task = asyncio.create_task(hear())
        if outputs:
            await heard.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def all_of(numbers: list[int], rng: random.Random) -> None:
        gone = [kind(rng.randrange(24), rng.randint(0, 6)) for kind in (leave, be_cancelled, leave, be_cancelled)]
        await asyncio.gather(*map(stay, numbers), *gone)

    def live(first: int) -> None:
        rng = random.Random(first)
        mine = list(range(first, 24, 4))
        for at in range(0, len(mine), 2):
            if rng.random() < 0.5:
                asyncio.run(all_of(mine[at : at + 2], rng))
                continue
            loop = asyncio.new_event_loop()
            left_behind = [llm.generate(prompts[n], sampling[n].but(max_tokens=200)) for n in rng.sample(range(24), 2)]
            for one in left_behind:
                loop.run_until_complete(one.__anext__())
            loop.run_until_complete(all_of(mine[at : at + 2], rng))
            loop.close()

    together(*(lambda first=first: live(first) for first in range(4)))  # type: ignore[misc]
    expected = [[(one.text, one.token_ids, one.logprobs, one.finish_reason) for one in outputs] for outputs in alone]
    assert [found[number] for number in range(24)] == expected
    while llm.num_unfinished_requests:  # of those left behind, which go on to their ends
        time.sleep(0.001)
    llm._loop.ask(lambda engine: None).result()
    assert gave_way(llm), "the pool was large enough for all"  # type: ignore[arg-type]
    assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    gc.collect()
    assert not llm._inboxes
    llm.close()


async def test_200_random_aborts_during_traffic(tiny_llama_dir: Path) -> None:
    """Every block comes home, and who is not aborted gets the answer he gets alone. Aborts hit requests that wait, are
    in their prompt, have branched, or were preempted: the pool holds one request of full length.
    """
    rng = random.Random(5)
    llm = AsyncLLM(
        str(tiny_llama_dir),
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=256,
        kv_cache_memory_bytes=20 * 16 * 2 * 2 * 2 * 8 * 4,  # blocks x tokens x layers x (K, V) x heads x head_dim x 4
    )
    assert llm.memory_plan.num_blocks == 20
    sampling = [params(seed=s, n=rng.choice([1, 1, 2, 3]), max_tokens=rng.randint(5, 40)) for s in range(20)]
    sampling += [params(seed=s, max_tokens=180) for s in range(20, 23)]  # of which only one fits
    prompts = [PROMPT * rng.randint(1, 12) for _ in sampling]
    expected = [(await last(llm, p, s)).outputs for p, s in zip(prompts, sampling, strict=True)]
    ended: list[str] = []
    events: list[Event] = []
    llm._loop.engine.events.subscribe(events.append)

    async def ask(number: int, how: str) -> None:
        which = number % 20 if number >= 0 else number
        if how == "finish":
            assert (await last(llm, prompts[which], sampling[which])).outputs == expected[which]
            return
        endless = sampling[which].but(max_tokens=None)
        task = asyncio.create_task(last(llm, prompts[which], endless, f"r{number}"))
        await asyncio.sleep(rng.random() * 0.1)
        if how == "cancel":
            task.cancel()
        while not task.done():  # an abort that comes before the request does nothing
            await llm.abort(f"r{number}")
            await asyncio.sleep(0.002)
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(result, asyncio.CancelledError):
            ended.append("cancel")
        else:
            assert isinstance(result, RequestOutput)
            ended.append(result.outputs[-1].finish_reason or "none")

    async def user(hows: list[str], first: int) -> None:
        for number, how in enumerate(hows, first):
            await ask(number, how)

    hows = ["abort", "cancel"] * 100 + ["finish"] * 40
    rng.shuffle(hows)
    users = [user(hows[n::20], 1000 * n) for n in range(20)]
    await asyncio.gather(*users, *(ask(-number, "finish") for number in (1, 2, 3)))
    await until_idle(llm)
    engine = llm._loop.engine
    engine.kv.check([])
    llm.close()
    # Some may have come to their end before it was asked for, and of those cancelled in the thread that tokenises the
    # engine never hears; how many depends on what else the machine does.
    assert len(ended) == 200 and set(ended) <= {"cancel", "abort", "length"}
    assert ended.count("cancel") > 0 and ended.count("abort") > 0
    aborted = sum(event.kind is EventKind.FINISHED and event.reason is Reason.ABORT for event in events)
    assert 0 < aborted <= 200
    assert any(event.kind is EventKind.PREEMPTED for event in events)


async def test_templates_of_requests_hold_up_no_others(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them at work than asyncio has threads for what takes a while: other requests are answered meanwhile, and
    those that then wait too long are told."""
    llm = AsyncLLM(str(tiny_llama_dir), max_model_len=256)
    begun = threading.Event()
    write, goes_on = llm._frontend.chat_prompt, threading.Event()

    def slow(messages: Any, chat_template: str | None, *rest: Any) -> Any:
        if chat_template not in (None, "default"):
            begun.set()
            goes_on.wait(60)
        return write(messages, chat_template, *rest)

    llm._frontend.chat_prompt = slow  # type: ignore[method-assign]
    messages = [{"role": "user", "content": "hi"}]

    async def ask(template: str | None) -> RequestOutput:
        return [output async for output in llm.chat(messages, params(max_tokens=2), chat_template=template)][-1]

    try:
        asked = [asyncio.create_task(ask("{{ messages[0].content }}")) for _ in range(2 * (os.cpu_count() or 1) + 40)]
        await asyncio.to_thread(begun.wait)
        for own in (None, "default"):
            assert (await asyncio.wait_for(ask(own), 50)).finished and not any(task.done() for task in asked)
        monkeypatch.setattr(async_llm, "_MAX_WAITING", -1.0)
        goes_on.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(one, RequestOutput) for one in answers)  # those that were at work
        late = [one for one in answers if not isinstance(one, RequestOutput)]
        assert len(late) > 30 and all(isinstance(one, RequestFailedError) for one in late)
    finally:
        goes_on.set()
        llm.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_template_of_a_request_in_a_forked_child(tiny_llama_dir: Path) -> None:
    """It is answered, and does not wait for threads that are the parent's."""
    llm = AsyncLLM(str(tiny_llama_dir), max_model_len=256)

    async def ask() -> None:
        messages = [{"role": "user", "content": "hi"}]
        async for _ in llm.chat(messages, params(max_tokens=2), chat_template="{{ messages[0].content }}"):
            pass

    asyncio.run(ask())
    child = os.fork()
    if not child:
        try:
            asyncio.run(ask())
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    llm.close()


async def test_both_doors_chat_with_the_same_options(llm: AsyncLLM, tiny_llama_dir: Path) -> None:
    """Tools, documents and variables reach the template, by whichever way they are given."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    template = (
        "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% for document in documents %}{{ document.text }}"
        " {% endfor %}{{ mood }} {{ who }} {{ messages[0].content }}{{ messages[-1].content }}"
    )
    options: dict[str, Any] = {
        "chat_template": template,
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "documents": [{"text": "It rained."}],
        "chat_template_kwargs": {"mood": "glad"},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "who": "Ann",
    }
    with LLM(str(tiny_llama_dir), max_model_len=256) as blocking:
        (expected,) = blocking.chat(messages, params(max_tokens=2), **options)
    outputs = [output async for output in llm.chat(messages, params(max_tokens=2), **options)]
    assert outputs[-1].prompt == expected.prompt == "weather It rained. glad Ann hiWell"
    assert outputs[-1].outputs[0].token_ids == expected.outputs[0].token_ids
    with pytest.raises(InvalidRequestError, match=r"chat_template_kwargs\.tools"):
        async for _ in llm.chat(messages, params(max_tokens=2), chat_template_kwargs={"tools": []}):
            pass
