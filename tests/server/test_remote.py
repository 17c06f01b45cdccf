"""An engine in a process of its own: the same answers, and what happens when it dies, hangs or is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo import (
    LLM,
    AskParams,
    AsyncLLM,
    BeamSearchParams,
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    MarginsParams,
    ModelNotFoundError,
    RequestFailedError,
    SamplingParams,
)
from octavo.build import build_engine
from octavo.config import EngineConfig
from octavo.core.session_calls import Call, Extend, Generate, Truncate
from octavo.server.connection import Connection
from octavo.server.engine_process import _Process
from octavo.server.served_llm import ServedLLM
from tests.test_margins import a_document

SETTINGS: dict[str, Any] = {"backend": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 2048}
DRAWN = SamplingParams(temperature=0.8, max_tokens=9, seed=3, logprobs=2)
CHOICE = {"choice": ["Paris", "London"]}
LONG = SamplingParams(temperature=0.8, max_tokens=1500, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def served(tiny_dir: Path) -> Iterator[ServedLLM]:
    llm = ServedLLM(str(tiny_dir), **SETTINGS)
    yield llm
    llm.close()


async def last(llm: AsyncLLM, prompt: Any, params: SamplingParams) -> Any:
    outputs = [output async for output in llm.generate(prompt, params)]
    return outputs[-1]


def facts(output: Any) -> list[Any]:
    return [(one.token_ids, one.text, one.finish_reason, one.logprobs) for one in output.outputs]


async def until(what: Callable[[], bool]) -> None:
    for _ in range(6000):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come")


async def test_the_same_answers(served: ServedLLM, tiny_dir: Path, tmp_path: Path) -> None:
    document, question = a_document(), "Where is the whale?"
    margins = MarginsParams(segment_tokens=90, margin=SamplingParams(max_tokens=9), threshold=-1e6, seed=5)
    ask = AskParams(answer=SamplingParams(max_tokens=9), order="cache", seed=5)
    documents = [{"id": "a", "text": document}, {"id": "b", "text": a_document(1)}]
    structured = SamplingParams(structured_outputs={"choice": ["Paris", "London"]}, seed=1)

    async def all_of(llm: AsyncLLM) -> list[Any]:
        found: list[Any] = [facts(await last(llm, "A whale", DRAWN.but(n=3, prompt_logprobs=1)))]
        found.append(facts(await last(llm, "A whale", structured)))
        beams = [output async for output in llm.beam_search("A whale", BeamSearchParams(beam_width=4, max_tokens=9))]
        found.append([(one.token_ids, one.score) for one in beams[-1].outputs])
        result = await (await llm.margins(document, question, margins)).result()
        found.append([result.text, [(m.text, m.score, m.kept) for m in result.answer.margins]])
        asked = await (await llm.ask(question, params=ask, documents=documents)).result()
        found.append([asked.text, asked.prompt_token_ids, asked.sources])
        asked = await (await llm.ask(question, params=ask.but(margins=margins), documents=documents)).result()
        found.append([asked.text, asked.sources])
        async with llm.session(seed=4) as session:
            await session.extend("The sea is ")
            a, b = await session.fork(2)
            outputs = await asyncio.gather(a.generate(DRAWN), b.generate(regex="[0-9]{3}", max_tokens=9))
            found.append([one.text for one in outputs])
            chosen = await session.select([" old", " white", " far away"])
            found.append([(one.text, one.logprobs) for one in chosen.choices])
            await a.truncate(3)
            found.append(a.token_ids)
        found.append((await llm.explain_cache("A whale")).num_cached_tokens)
        found.append(await llm.reset_prefix_cache() > 0)
        return found

    async with AsyncLLM(str(tiny_dir), **SETTINGS) as llm:
        expected = await all_of(llm)
    for mine, theirs in zip(await all_of(served), expected, strict=True):
        assert mine == theirs
    assert served.system_fingerprint == llm.system_fingerprint and served.max_model_len == llm.max_model_len


async def test_refusals_come_through(served: ServedLLM) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await last(served, "A", SamplingParams(structured_outputs={"regex": "("}))
    assert caught.value.field == "structured_outputs.regex"
    running = served.generate("A", LONG, "mine")
    await anext(running)
    with pytest.raises(InvalidRequestError, match="is in use"):
        await anext(served.generate("A", DRAWN, "mine"))
    await running.aclose()
    async with served.session() as session:
        await session.extend("A")
        with pytest.raises(InvalidRequestError):
            await session.truncate(50)


@pytest.mark.parametrize("field", ["request_id", "cache_salt"])
async def test_text_that_no_message_can_hold_is_refused(served: ServedLLM, field: str) -> None:
    prompt: Any = {"prompt": "A", "cache_salt": "\ud800"} if field == "cache_salt" else "A"
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        await anext(served.generate(prompt, DRAWN, "\ud800" if field == "request_id" else None))
    assert caught.value.field.endswith(field)
    if field == "cache_salt":
        with pytest.raises(InvalidRequestError, match="surrogate"):
            served.session(cache_salt="\ud800")


async def test_what_cannot_be_sent_fails_alone(served: ServedLLM) -> None:
    """Whatever gets past the checks: the thread that sends goes on."""
    expected = facts(await last(served, "A whale", DRAWN))
    spec = replace(served._frontend.make("A whale", DRAWN).spec, cache_salt="\ud800")
    with pytest.raises(RequestFailedError, match="cannot be sent"):
        list(served._loop.run([spec]))
    with pytest.raises(RequestFailedError, match="cannot be sent"):
        served._loop.explain_cache([1], "\ud800").result()
    assert facts(await last(served, "A whale", DRAWN)) == expected
    assert served.num_unfinished_requests == 0 and not served.engine._answers


async def test_callers_who_go_away(served: ServedLLM) -> None:
    for _ in range(5):
        running = served.generate("A whale", LONG)
        await anext(running)
        await running.aclose()
    await served.abort("nobody")
    running = served.generate("A whale", LONG, "it")
    await anext(running)
    await served.abort("it")
    outputs = [output async for output in running]
    assert outputs[-1].outputs[0].finish_reason == "abort"
    await until(lambda: served.engine.figures.get("requests") == 0)
    figures = served.engine.figures
    assert figures["available_blocks"] == figures["blocks"] and served.num_unfinished_requests == 0


async def test_many_at_once(served: ServedLLM) -> None:
    alone = [facts(await last(served, f"A whale {n}", DRAWN.but(seed=n))) for n in range(12)]
    together = await asyncio.gather(*(last(served, f"A whale {n}", DRAWN.but(seed=n)) for n in range(12)))
    assert [facts(one) for one in together] == alone


async def test_killed_under_load(tiny_dir: Path) -> None:
    """What had begun ends with an error, what had not is answered, and so is what comes later."""
    llm = ServedLLM(str(tiny_dir), **SETTINGS | {"max_num_seqs": 2})
    try:
        expected = facts(await last(llm, "A whale", DRAWN))
        started = [llm.generate("A", LONG.but(seed=n)) for n in range(2)]
        for one in started:
            await anext(one)
        waiting = [asyncio.ensure_future(last(llm, "A whale", DRAWN)) for _ in range(3)]
        session = llm.session()
        await until(lambda: llm.num_unfinished_requests == 6)
        first = llm.engine.pid
        os.kill(first, signal.SIGKILL)
        for one in started:
            with pytest.raises(RequestFailedError, match="SIGKILL"):
                async for _ in one:
                    pass
        assert [facts(one) for one in await asyncio.gather(*waiting)] == [expected] * 3
        assert llm.engine.pid != first and llm.engine.num_restarts == 1 and llm.engine.state == "running"
        with pytest.raises((InvalidRequestError, EngineClosedError)):
            await session.extend("A")
        assert facts(await last(llm, "A whale", DRAWN)) == expected
        async with llm.session() as other:
            await other.extend("A")
    finally:
        llm.close()
    assert _gone(llm.engine.pid)


async def test_an_engine_that_stands_still_is_ended(tiny_dir: Path) -> None:
    llm = ServedLLM(str(tiny_dir), hang_seconds=5.0, **SETTINGS)
    try:
        running = llm.generate("A", LONG)
        await anext(running)
        first = llm.engine.pid
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(RequestFailedError, match="SIGKILL"):
            async for _ in running:
                pass
        assert (await last(llm, "A", DRAWN)).finished and llm.engine.pid != first
    finally:
        llm.close()


async def test_a_request_that_breaks_engines_is_not_asked_for_ever(tiny_dir: Path) -> None:
    """One that had not begun when the engine died is asked once more; when that dies too it ends."""
    llm = ServedLLM(str(tiny_dir), **SETTINGS | {"max_num_seqs": 1})
    try:
        started = llm.generate("A", LONG)
        await anext(started)
        waiting = asyncio.ensure_future(last(llm, "A", LONG.but(max_tokens=1900)))
        await until(lambda: llm.num_unfinished_requests == 2)
        os.kill(llm.engine.pid, signal.SIGKILL)
        await until(lambda: llm.engine.num_restarts == 1)
        os.kill(llm.engine.pid, signal.SIGKILL)
        with pytest.raises(RequestFailedError, match="SIGKILL"):
            await waiting
        await until(lambda: llm.engine.num_restarts == 2)
        assert (await last(llm, "A", DRAWN)).finished
        await started.aclose()
    finally:
        llm.close()


async def test_killed_while_callers_have_gone_away(tiny_dir: Path) -> None:
    """Who has cancelled a question hears nothing of the engine's end, and it is started again all the same."""
    llm = ServedLLM(str(tiny_dir), **SETTINGS)
    try:
        os.kill(llm.engine.pid, signal.SIGSTOP)
        gone, waits = asyncio.ensure_future(llm.explain_cache("A")), asyncio.ensure_future(llm.reset_prefix_cache())
        await until(lambda: len(llm.engine._answers) == 2)
        gone.cancel()
        os.kill(llm.engine.pid, signal.SIGKILL)
        with pytest.raises(EngineClosedError, match="SIGKILL"):
            await waits
        await until(lambda: llm.engine.num_restarts == 1)
        assert (await last(llm, "A", DRAWN)).finished
    finally:
        llm.close()


async def test_what_is_aborted_before_a_new_start_does_not_begin(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a new engine that cannot be started at first, whatever the reason, stay the last."""
    llm = ServedLLM(str(tiny_dir), **SETTINGS | {"max_num_seqs": 1})
    try:
        started = llm.generate("A", LONG)
        await anext(started)
        tasks = [asyncio.ensure_future(last(llm, "A", LONG.but(max_tokens=n))) for n in (1700, 1800)]
        await until(lambda: llm.num_unfinished_requests == 3)
        start, go_on, states = llm.engine._start, threading.Event(), []

        def late() -> Any:
            states.append(llm.engine.state)
            if len(states) == 1:
                raise OSError("no process is left")
            assert go_on.wait(30)
            made = start()
            states.append(llm.engine.state)  # the new one is not to be asked yet
            return made

        monkeypatch.setattr(llm.engine, "_start", late)
        os.kill(llm.engine.pid, signal.SIGSTOP)
        tasks[0].cancel()  # the engine does not hear of it
        await until(lambda: sum(one.aborted for one in llm.engine._requests.values()) == 1)
        os.kill(llm.engine.pid, signal.SIGKILL)
        await until(lambda: len(states) == 2)
        assert llm.num_unfinished_requests == 1
        tasks[1].cancel()
        await until(lambda: llm.num_unfinished_requests == 0)
        go_on.set()
        await until(lambda: llm.engine.num_restarts == 1)
        assert states == ["restarting"] * 3 and llm.engine.state == "running"
        assert (await last(llm, "A", DRAWN)).finished
        await started.aclose()
    finally:
        llm.close()
    assert llm.engine.state == "closed"


async def test_closed_in_the_middle(tiny_dir: Path) -> None:
    llm = ServedLLM(str(tiny_dir), **SETTINGS)
    running = llm.generate("A", LONG)
    await anext(running)
    pid = llm.engine.pid
    llm.close()
    llm.close()
    with pytest.raises((EngineClosedError, RequestFailedError)):
        async for output in running:
            if output.finished:
                raise RequestFailedError(str(output.outputs[0].finish_reason))
    with pytest.raises(EngineClosedError):
        await last(llm, "A", DRAWN)
    assert _gone(pid)


def test_an_engine_goes_with_its_server(tiny_dir: Path) -> None:
    """Whatever ends the server: its socket closes."""
    import subprocess
    import sys

    code = (
        "import sys, time\nfrom octavo.server.served_llm import ServedLLM\n"
        f"llm = ServedLLM({str(tiny_dir)!r}, backend='cpu')\nprint(llm.engine.pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert not _gone(pid)
        server.kill()
    for _ in range(3000):
        if _gone(pid):
            return
        time.sleep(0.01)
    raise AssertionError("it lives on")


def test_a_grammar_that_takes_long_holds_up_its_request_alone(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's side, in this process: others are answered meanwhile; what is asked of the same request or
    session comes behind it."""
    engine = build_engine(EngineConfig(model=str(tiny_dir), **SETTINGS))
    frontend = engine.frontend
    plain, late = frontend.make("A whale", DRAWN).spec, frontend.make("A", LONG.but(structured_outputs=CHOICE)).spec
    session = frontend.make_session(None, 0, None)
    turn = Generate(frontend.make_turn(session, SamplingParams(structured_outputs=CHOICE, max_tokens=9), 2))
    frontend.tokens.grammars._cached.clear()
    check, may_compile = frontend.tokens.grammars.check, threading.Event()

    def slow(params: Any) -> None:
        assert may_compile.wait(60)
        check(params)

    monkeypatch.setattr(frontend.tokens.grammars, "check", slow)
    ours, theirs = socket.socketpair()
    connection = Connection(ours, "ours")
    process = _Process(engine, Connection(theirs, "theirs"))
    running = threading.Thread(target=process.run)
    running.start()
    told: list[Any] = []

    def hear(until: Callable[[Any], bool]) -> None:
        while True:
            message = connection.receive()
            told.append(message)
            if until(message):
                return

    connection.send(("add", [late]))
    connection.send(("add_session", session))
    connection.send(("ask", 1, "call", (session.request_id, [Call(0, 0, Extend((5, 6)))])))
    connection.send(("ask", 2, "call", (session.request_id, [Call(1, 0, turn)])))
    connection.send(("ask", 3, "call", (session.request_id, [Call(2, 0, Truncate(1))])))
    connection.send(("abort", [late.request_id]))
    connection.send(("add", [plain]))
    hear(lambda message: message[0] == "output" and message[1].request_id == plain.request_id and message[1].finished)
    outputs = [message[1].request_id for message in told if message[0] == "output"]
    answers = [message[1] for message in told if message[0] == "answer"]
    assert set(outputs) == {plain.request_id} and answers == [1]
    may_compile.set()
    ended: set[Any] = set()

    def all_came(message: Any) -> bool:
        if message[0] == "output" and message[1].finished:
            ended.add(message[1].outputs[0].finish_reason)
        if message[0] in ("answer", "settled"):
            ended.add(message[:2])
        return len(ended) == 4

    hear(all_came)
    assert ended == {"abort", ("answer", 2), ("answer", 3), ("settled", 1)}
    (refused,) = next(message[2] for message in told if message[:2] == ("answer", 3))
    assert isinstance(refused, InvalidRequestError)  # the branch is at work: it came behind the other
    connection.send(("close",))
    running.join(60)
    connection.close()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"model": "no/such/folder"}, ModelNotFoundError),
        ({"max_model_len": 1 << 30}, ConfigError),
    ],
)
def test_what_cannot_be_built_is_told(tiny_dir: Path, given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ServedLLM(**{"model": str(tiny_dir), **given})


def test_threads_of_the_caller(served: ServedLLM, tiny_dir: Path) -> None:
    """The blocking way over the same engine: what `run` gives."""
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        expected = facts(llm.generate("A whale", DRAWN, use_tqdm=False)[0])
    found: list[Any] = []

    def ask() -> None:
        request = served._frontend.make("A whale", DRAWN)
        read = served._frontend.reader(request)
        for output in served._loop.run([request.spec]):
            answer = read(output)
        found.append(facts(answer))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6
