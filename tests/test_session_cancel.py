"""Callers of a session who go away: the branch is what it was, and all that follows is as if they had never called."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from octavo import session as session_module
from octavo.async_llm import AsyncLLM
from octavo.async_session import AsyncSession
from octavo.core.outputs import RequestOutput
from octavo.session import Session
from tests.sessions import coordinator_of, state_of
from tests.test_llm import check_idle, interrupt_at_step

TEXT = "the quick brown fox jumps over"
SLOW: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}
# Every parameter that looks at the tokens before: which of them are prompt, how many are output.
LOOKING: dict[str, Any] = {
    "max_tokens": 10, "ignore_eos": True, "logprobs": 2, "repetition_penalty": 1.3, "presence_penalty": 0.5,
    "frequency_penalty": 0.4, "min_tokens": 3, "bad_words": ["the"], "stop": ["qqq"],
}  # fmt: skip
CONFIG: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512}


class Gate:
    """Lets the engine's steps through one by one, so that a moment is a number of steps and no time."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._engine = llm._loop.engine
        self._step = self._engine.step
        self._may = threading.Semaphore(0)
        self.taken = 0
        self._engine.step = self._gated  # type: ignore[method-assign]

    def _gated(self) -> list[RequestOutput]:
        self._may.acquire()
        self.taken += 1
        return self._step()

    async def let(self, steps: int) -> None:
        before = self.taken
        self._may.release(steps)
        while self.taken < before + steps or (self._engine.has_unfinished_requests and self._may._value):  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)

    def open(self) -> None:
        self._engine.step = self._step  # type: ignore[method-assign]
        self._may.release(1000)


@pytest.fixture(scope="module")
def llm(tiny_gemma3_dir: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(tiny_gemma3_dir), **CONFIG)
    yield llm
    llm.close()
    kv = llm._loop.engine.kv
    assert kv.num_available == kv.num_blocks


class Asked:
    """Counts what is asked of the engine's thread."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask
        self.times = 0

    def __call__(self, *arguments: Any) -> Any:
        self.times += 1
        return self._ask(*arguments)


async def cancelled(gate: Gate, steps: int, call: Coroutine[Any, Any, Any]) -> None:
    """The caller goes away after so many steps."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0)
    while gate._engine.scheduler.num_waiting + gate._engine.scheduler.num_running == 0 and not task.done():
        await asyncio.sleep(0.001)
    if steps:
        await gate.let(steps)
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task


def told(output: Any) -> Any:
    return output.token_ids, output.text, output.logprobs


async def went_on(llm: AsyncLLM, cancel: Callable[[AsyncSession, int], Any] | None, steps: int) -> Any:
    """What a session says after a call that was cancelled, or after none."""
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        await s.generate(max_tokens=3, ignore_eos=True)
        if cancel is not None:
            held = s.token_ids
            await cancel(s, steps)
            assert s.token_ids == held and s.num_tokens == len(held), "at once, not after a while"
            assert len(coordinator_of(s).sequences) == 1 and state_of(s).num_forks == 0
        first = await s.generate(**LOOKING)
        (fork,) = await s.fork(1)
        second = await fork.generate(**LOOKING)
        await s.extend(" and")
        third = await s.generate(**LOOKING)
        return told(first), told(second), told(third), fork.token_ids, s.token_ids


@pytest.mark.parametrize("verb", ["generate", "select"])
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
async def test_cancelled_at_any_moment(llm: AsyncLLM, verb: str, steps: int) -> None:
    """Waiting, computed, drawing: what comes after has the tokens, the text and the log-probabilities of a session in
    which it was never asked. Penalties count no token that is not there, and draws are those of the first generate."""

    async def cancel(s: AsyncSession, steps: int) -> None:
        call = s.generate(**SLOW) if verb == "generate" else s.select([" x" * 40, " y", " z" * 60], extend=True)
        gate = Gate(llm)
        try:
            await cancelled(gate, min(steps, 2 if verb == "select" else steps), call)
        finally:
            gate.open()

    assert await went_on(llm, cancel, steps) == await went_on(llm, None, 0)


@pytest.mark.parametrize("verb", ["fork", "extend", "truncate"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_verbs_whose_callers_are_gone(llm: AsyncLLM, verb: str, when: str) -> None:
    """Cancelled before the engine has taken them, or when it has and nobody heard of it: ten of them leave nothing."""

    async def cancel(s: AsyncSession, _: int) -> None:
        for _ in range(10):
            with pytest.MonkeyPatch.context() as patch:
                asked = Asked(s._client.ask)
                patch.setattr(s._client, "ask", asked)
                call = {"fork": s.fork(4), "extend": s.extend(" dog"), "truncate": s.truncate(2)}
                task = asyncio.create_task(call.pop(verb))  # type: ignore[arg-type]
                for other in call.values():
                    other.close()
                while not asked.times:
                    await asyncio.sleep(0)
                if when == "after":  # nobody hears of it before the event loop has its turn
                    llm._loop.ask(lambda engine: None).result(20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    assert await went_on(llm, cancel, 0) == await went_on(llm, None, 0)


async def test_a_second_cancel_does_not_stop_the_first(llm: AsyncLLM) -> None:
    """Guards against a branch that is left at work when its caller is in a hurry."""
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        gate = Gate(llm)
        task = asyncio.create_task(s.generate(**SLOW))
        while not llm._loop.engine.has_unfinished_requests:
            await asyncio.sleep(0.001)
        await gate.let(3)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        first = await s.generate(**LOOKING)
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        assert told(await s.generate(**LOOKING)) == told(first)


async def test_looked_at_while_it_is_taken_back(llm: AsyncLLM) -> None:
    """Somebody else than the caller who went away, as behind asyncio.gather, which waits for the first to end: the call
    had its answer already, and the engine has not come to taking it back."""
    stopped = threading.Event()
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        held, text = s.token_ids, s.text
        with pytest.MonkeyPatch.context() as patch:
            asked = Asked(s._client.ask)
            patch.setattr(s._client, "ask", asked)
            task = asyncio.create_task(s.generate(max_tokens=5, ignore_eos=True))
            while not asked.times:
                await asyncio.sleep(0)
        while not state_of(s).num_generated or state_of(s).task is not None:  # the event loop hears of no end
            time.sleep(0.001)
        assert state_of(s).num_tokens == len(held) + 5
        llm._loop.ask(lambda engine: stopped.wait(20))
        try:
            task.cancel()
            while s._undoing is None:
                await asyncio.sleep(0)
            assert (s.token_ids, s.num_tokens, s.text) == (held, len(held), text) and not s._undoing.done()
        finally:
            stopped.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (s.token_ids, s.num_tokens, s.text) == (held, len(held), text)


async def test_cancelled_before_anything_was_asked(llm: AsyncLLM) -> None:
    """While the verb was still being made ready in another thread: there is nothing to take back, nor to wait for."""
    ready = threading.Event()
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        held = s.token_ids
        with pytest.MonkeyPatch.context() as patch:
            asked = Asked(s._client.ask)
            patch.setattr(s._client, "ask", asked)
            patch.setattr(s, "_generating", lambda params: ready.wait(20))
            task = asyncio.create_task(s.generate(**LOOKING))
            while not s._in_use.locked():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not asked.times and s.token_ids == held and s.num_tokens == len(held)
            ready.set()
        first = await s.generate(**LOOKING)
    async with llm.session(seed=1) as s:
        await s.extend(TEXT)
        assert told(await s.generate(**LOOKING)) == told(first)


async def test_a_time_out(llm: AsyncLLM) -> None:
    """As users have it: asyncio's own, around several branches at once."""
    async with llm.session(seed=3) as s:
        await s.extend(TEXT)
        branches = await s.fork(3)
        held = [branch.token_ids for branch in branches]
        for limit in (0.0, 0.001, 0.01, 0.05):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(limit):
                    await asyncio.gather(*(branch.generate(**SLOW) for branch in branches), asyncio.sleep(10))
            assert [branch.token_ids for branch in branches] == held
        outputs = await asyncio.gather(*(branch.generate(**LOOKING) for branch in branches))
    async with llm.session(seed=3) as s:
        await s.extend(TEXT)
        branches = await s.fork(3)
        again = await asyncio.gather(*(branch.generate(**LOOKING) for branch in branches))
    assert [told(output) for output in outputs] == [told(output) for output in again]


# --- blocking sessions, and interrupts ---


@pytest.fixture(scope="module")
def tiny(tiny_gemma3_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_gemma3_dir), **CONFIG) as llm:
        yield llm


@pytest.mark.parametrize("step", [0, 1])
def test_interrupts(tiny: LLM, step: int) -> None:
    """Ctrl-C in generate, generate_all and select: the branches are what they were when it arrives at the caller."""

    def asked(s: Session, interrupted: bool) -> Any:
        s.extend(TEXT)
        left, right = s.fork(2)
        if interrupted:
            held = s.token_ids
            for call in (
                lambda: s.generate(**SLOW),
                lambda: s.generate_all([s, left, right], **SLOW),
                lambda: left.select([" x" * 100, " y" * 110], extend=True),
            ):
                with interrupt_at_step(tiny, step), pytest.raises(KeyboardInterrupt):
                    call()
                assert [branch.token_ids for branch in (s, left, right)] == [held] * 3
                assert len(coordinator_of(s).sequences) == 3
        return [told(output) for output in s.generate_all([s, left, right], **LOOKING)]

    with tiny.session(seed=5) as s:
        interrupted = asked(s, True)
    with tiny.session(seed=5) as s:
        assert asked(s, False) == interrupted
    check_idle(tiny)


def test_a_second_interrupt(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when all have answered, and again while that is taken back: whoever asks next of any of the branches
    waits until it is. Guards against texts that go on after tokens that are about to be gone."""
    with tiny.session(seed=5) as s:
        s.extend(TEXT)
        (left,) = s.fork(1)
        held, text = left.token_ids, left.text
        stopped = threading.Event()  # the engine's thread stands still until it is set
        waits: list[bool] = []

        def interrupted_wait(futures: Any) -> Any:
            waits.append(True)
            if len(waits) == 1:  # the call's own
                wait(futures)
                tiny._loop.ask(lambda engine: stopped.wait(10))
                raise KeyboardInterrupt
            stopped.set()
            return wait(futures)

        take_back = s._client.take_back

        def interrupted_again(calls: Any) -> Any:
            undoing = take_back(calls)
            monkeypatch.setattr(undoing, "result", raising)
            return undoing

        def raising() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(s._client, "take_back", interrupted_again)
        with monkeypatch.context() as patch:
            patch.setattr(session_module, "wait", interrupted_wait)
            with pytest.raises(KeyboardInterrupt):
                s.generate_all([s, left], **LOOKING)
            assert [(b.token_ids, b.num_tokens, b.text) for b in (s, left)] == [(held, len(held), text)] * 2
            left.extend(" dog")
        assert left.token_ids[: len(held)] == held and s.token_ids == held
        assert left.token_ids == held + tiny.tokenizer.encode(" dog", add_special_tokens=False)
        assert len(waits) == 2
    check_idle(tiny)
