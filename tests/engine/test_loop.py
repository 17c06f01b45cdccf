"""The engine's thread outlives whatever commands, deliveries and requests raise, and everybody hears of what concerns
him."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from octavo.coordinators.branches import SessionCoordinator
from octavo.coordinators.single import SingleCoordinator
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.core.outputs import OutputSoFar, RequestOutput
from octavo.core.params import SamplingParams
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.session_calls import ROOT, Call, Extend
from octavo.engine import Engine, EngineLoop
from tests.engine.fake import Harness, expected


class Panic(BaseException):
    """As Rust code raises it: no Exception."""


@pytest.fixture
def loop() -> Iterator[EngineLoop]:
    made = EngineLoop(Harness().engine)
    yield made
    made.close()


def request(name: str, prompt: list[int], count: int = 4) -> RequestSpec:
    return RequestSpec(name, tuple(prompt), SamplingParams(max_tokens=count), seed=0, max_tokens=count)


def answer(loop: EngineLoop, name: str, prompt: list[int]) -> list[int]:
    so_far = OutputSoFar()
    outputs = [so_far.merge(output) for output in loop.run([request(name, prompt)])]
    assert outputs[-1].finished and outputs[-1].error is None
    return outputs[-1].outputs[0].token_ids


def works(loop: EngineLoop) -> bool:
    return answer(loop, "another", [1, 2, 3]) == expected([1, 2, 3], 4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Panic])
def test_a_command_that_raises(loop: EngineLoop, error: type[BaseException]) -> None:
    def command(engine: Engine) -> None:
        raise error

    loop.post(command)
    assert works(loop)
    with pytest.raises(error):
        loop.ask(command).result(20)
    assert works(loop)


def test_a_question_whose_asker_is_gone(loop: EngineLoop) -> None:
    """Guards against an answer that cannot be set any more."""

    def question(engine: Engine) -> None:
        asked.result_was_cancelled = asked.cancel()  # type: ignore[attr-defined]

    asked: Future[Any] = Future()
    asked = loop.ask(question)
    asked.result(20)
    assert works(loop)


def test_an_id_in_use(loop: EngineLoop) -> None:
    """By a request, which goes on, or by a session, which stands in no list of those who are delivered to."""
    ended: list[object] = []
    loop.add_session(SessionSpec("session", seed=0), ended.append)
    outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
    loop.add([request("running", [5] * 6, 2000)], outputs.put)
    for name in ("session", "running"):
        with pytest.raises(InvalidRequestError, match=f"request_id: '{name}' is in use"):
            answer(loop, name, [1, 2, 3])
    assert loop.ask(lambda engine: engine.num_requests).result(20) == 2
    loop.abort(["running"])
    while not (output := outputs.get(timeout=20)).finished:  # type: ignore[union-attr]
        pass
    assert output.outputs[0].finish_reason == "abort"  # type: ignore[union-attr]
    assert works(loop) and not ended
    loop.abort(["session"])
    assert works(loop)
    (last,) = ended
    assert isinstance(last, RequestOutput) and last.finished and last.error is None


@pytest.mark.parametrize("error", [KeyError, Panic])
def test_requests_that_cannot_start(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """The others of the call start all the same; a session says so to whoever asks something of it."""

    def start(self: Any, new_sequence: Any) -> None:
        if self.request_id == "good":
            return real(self, new_sequence)
        new_sequence((0,))
        raise error("oops")

    real = SingleCoordinator.start
    outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr(SingleCoordinator, "start", start)
        loop.add([request("bad", [1, 2]), request("good", [1, 2])], outputs.put)
        failed = outputs.get(timeout=20)
        assert isinstance(failed, RequestFailedError) and "oops" in str(failed)
        while not (output := outputs.get(timeout=20)).finished:  # type: ignore[union-attr]
            assert output.request_id == "good"  # type: ignore[union-attr]
        patch.setattr(SessionCoordinator, "start", start)
        ended: list[object] = []
        loop.add_session(SessionSpec("session", seed=0), ended.append)
        assert loop.ask(lambda engine: engine.num_requests).result(20) == 0
    assert isinstance(ended[0], RequestFailedError) and "oops" in str(ended[0])
    calls = [Call(0, ROOT, Extend((1,)))]
    assert loop.ask(lambda engine: engine.call("session", calls)).result(20) == []
    assert works(loop)


def test_a_delivery_that_raises_ends_its_request(loop: EngineLoop) -> None:
    got: list[object] = []

    def deliver(output: object) -> None:
        got.append(output)
        raise RuntimeError("the event loop is closed")

    loop.add([request("unheard", [1, 2], 3000)], deliver)
    assert works(loop)
    while loop.ask(lambda engine: engine.num_requests).result(20):
        pass
    assert len(got) == 1


@pytest.mark.parametrize("error", [AssertionError, Panic])
def test_a_step_that_fails_as_a_whole(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """It is nobody's fault alone: all requests end with an error, the engine does not."""

    def failing() -> None:
        raise error("a block is lost")

    with monkeypatch.context() as patch:
        patch.setattr(loop.engine.scheduler, "schedule", failing)
        outputs = list(loop.run([request("a", [1, 2]), request("b", [3, 4])]))
        assert [(output.finished, output.error) for output in outputs] == [
            (True, f"{error.__name__}: a block is lost")
        ] * 2
    assert works(loop)


def test_a_thread_that_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is told, and later callers as well; closing does not wait."""
    loop = EngineLoop(Harness().engine)

    def failing() -> None:
        raise Panic("nothing works")

    monkeypatch.setattr(loop.engine, "step", failing)
    monkeypatch.setattr(loop.engine, "end_all", lambda error: failing())
    with pytest.raises(EngineClosedError, match="the engine died: Panic"):
        answer(loop, "a", [1, 2])
    assert loop.thread is not None
    loop.thread.join(20)
    with pytest.raises(EngineClosedError, match="the engine died: Panic"):
        answer(loop, "a", [1, 2])
    loop.close()
