"""An error belongs to one request: it ends with a reason, its blocks go home, the others do not notice."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.coordinators.beams import BeamCoordinator
from octavo.coordinators.single import SingleCoordinator
from octavo.core.beam_params import BeamSearchParams
from octavo.core.coordinator import NewSequence
from octavo.core.errors import InvalidRequestError
from octavo.core.events import Event, EventKind
from octavo.core.plan import GrantResult, StepResult
from octavo.core.request import RequestSpec
from octavo.kv_cache import BlockTable
from tests.engine.fake import Harness, expected


def test_a_failing_row_ends_alone() -> None:
    harness = Harness()
    for name in "abc":
        harness.add(name, [ord(name)] * 9, max_tokens=6)
    harness.step()
    harness.step()
    harness.executor.fail = lambda grant: grant.request_id == "b"
    harness.run()
    assert harness.outputs["b"].outputs[0].finish_reason == "error"
    assert "a row failed" in (harness.outputs["b"].error or "")
    for name in "ac":
        assert harness.outputs[name].error is None
        assert harness.tokens(name) == expected([ord(name)] * 9, 6)
    assert harness.engine.events.of(EventKind.STEP_RETRIED)


def test_a_step_that_raises_once_is_retried_without_loss() -> None:
    harness = Harness()
    tries: list[int] = []

    def once(grant: object) -> bool:
        tries.append(1)
        return len(tries) == 4

    harness.executor.fail = once
    for name in "abc":
        harness.add(name, [ord(name)] * 9, max_tokens=6, n=2)
    harness.run()
    for name in "abc":
        assert harness.tokens(name, 1) == expected([ord(name)] * 9, 6, 1)


def test_copies_survive_a_retry() -> None:
    """The step that forks copies on write is the one that fails: the retry must not write over a shared block."""
    harness = Harness()
    state = {"armed": True, "hit": False}

    def fail(grant: object) -> bool:
        if state["armed"] and harness.executor._plan.copies:
            state["armed"], state["hit"] = False, True
            return True
        return False

    harness.executor.fail = fail
    harness.add("forks", [5] * 6, max_tokens=6, n=4)
    harness.run()
    assert state["hit"]
    for index in range(4):
        assert harness.tokens("forks", index) == expected([5] * 6, 6, index)


@pytest.mark.parametrize("caching", [False, True])
def test_copies_that_fail_are_done_without(caching: bool) -> None:
    """Tables that name blocks which were not copied claim KV that is not there: their sequences are computed anew,
    those without a grant in this step too, and nobody ends."""
    harness = Harness(caching=caching)
    harness.add("forks", [5] * 6, max_tokens=6, n=4)
    harness.add("other", [6] * 6, max_tokens=6)
    harness.step()
    harness.executor.fail_copies = True
    harness.step()
    assert len(harness.engine.events.of(EventKind.EVICTED)) == 3, "the fork that needed no copy stays"
    harness.step()
    harness.executor.fail_copies = False
    harness.run()
    assert harness.tokens("other") == expected([6] * 6, 6)
    assert harness.outputs["forks"].num_cached_tokens <= 6 and harness.outputs["other"].num_cached_tokens <= 6
    for index in range(4):
        assert harness.tokens("forks", index) == expected([5] * 6, 6, index)


def test_an_error_in_one_result_ends_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with NaN logits is reported by the executor for that row alone."""
    harness = Harness()
    harness.add("good", [1, 2, 3], max_tokens=4)
    harness.add("bad", [4, 5, 6], max_tokens=4)
    real = harness.executor.result

    def result() -> StepResult:
        step = real()
        grants = harness.executor._plan.grants
        pairs = zip(step.results, grants, strict=True)
        return StepResult(tuple(GrantResult(error="NaN") if g.request_id == "bad" else r for r, g in pairs))

    monkeypatch.setattr(harness.executor, "result", result)
    harness.run()
    assert harness.outputs["bad"].error == "NaN"
    assert harness.tokens("good") == expected([1, 2, 3], 4)


def test_a_coordinator_that_raises_ends_alone() -> None:
    harness = Harness()
    harness.add("good", [1, 2, 3], max_tokens=4)
    harness.add("bad", [4, 5, 6], max_tokens=4)
    bad = next(c for c in harness.engine.scheduler.coordinators() if c.request_id == "bad")

    def explode(results: object) -> None:
        raise KeyError("oops")

    bad.update = explode  # type: ignore[method-assign]
    harness.run()
    assert "KeyError" in (harness.outputs["bad"].error or "")
    assert harness.tokens("good") == expected([1, 2, 3], 4)


def test_close_ends_everything() -> None:
    harness = Harness()
    for name in "abc":
        harness.add(name, [1] * 5, max_tokens=50)
    harness.step()
    outputs = harness.engine.close()
    assert {output.request_id for output in outputs} == set("abc")
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    assert harness.kv.num_available == harness.kv.num_blocks
    assert harness.executor.closed


def test_a_request_id_in_use_is_refused() -> None:
    harness = Harness()
    harness.add("a", [1], max_tokens=5)
    with pytest.raises(InvalidRequestError, match="request_id: 'a' is in use"):
        harness.add("a", [1], max_tokens=5)
    harness.run()
    harness.add("a", [1], max_tokens=5)
    harness.run()


def test_a_request_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a ghost in the queue, which would be scheduled and could not be ended."""
    harness = Harness()

    class Panic(BaseException):
        pass

    def start(self: SingleCoordinator, new_sequence: NewSequence) -> None:
        self.sequences.append(new_sequence((0,)))
        self.sequences[0].extend([1, 2, 3])
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(SingleCoordinator, "start", start)
        with pytest.raises(Panic):
            harness.add("ghost", [1, 2, 3], max_tokens=5)
    assert not harness.engine.has_unfinished_requests and harness.engine.num_requests == 0
    harness.add("ghost", [1, 2, 3], max_tokens=5)
    harness.run()
    assert harness.tokens("ghost") == expected([1, 2, 3], 5)


@pytest.mark.parametrize("place", ["match", "allocate", "cached_prefix", "pending_block", "commit"])
def test_what_raises_over_one_request_ends_it_alone(place: str) -> None:
    """In scheduling, admission and committing, for requests that run and that wait, at the first moment and later."""
    prompts = {name: [number] * 13 for number, name in enumerate("abc")}
    ended = set()
    for victim in prompts:
        for first in range(1, 8, 2):
            harness = Harness(num_blocks=14, max_num_batched_tokens=9)
            real = getattr(harness.kv, place)
            calls: list[str] = []

            def failing(
                table: BlockTable, *rest: Any, victim: str = victim, calls: list[str] = calls, first: int = first,
                real: Any = real,
            ) -> Any:  # fmt: skip
                calls += [victim] * (table.request_id == victim)
                if table.request_id == victim and len(calls) >= first:
                    raise RecursionError("too deep")
                return real(table, *rest)

            setattr(harness.kv, place, failing)
            for name, prompt in prompts.items():
                harness.add(name, prompt, max_tokens=8)
            harness.run()
            failed = {event.request_id for event in harness.engine.events.of(EventKind.FAILED)}
            assert failed == ({victim} if len(calls) >= first else set())
            ended |= failed
            for name, prompt in prompts.items():
                if name in failed:
                    assert "RecursionError: too deep" in (harness.outputs[name].error or "")
                else:
                    assert harness.tokens(name) == expected(prompt, 8)
    assert len(ended) >= (1 if place == "cached_prefix" else 3)


@pytest.mark.parametrize("method", ["take_output", "finish", "contain"])
def test_bookkeeping_of_a_request_that_raises_ends_it_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    harness = Harness()
    for name in ("good", "bad"):
        harness.add(name, [4, 5, 6], max_tokens=4)
    bad = next(c for c in harness.engine.scheduler.coordinators() if c.request_id == "bad")

    class Panic(BaseException):
        """As Rust code raises it: no Exception."""

    def explode(*arguments: object) -> None:
        raise Panic("oops")

    setattr(bad, method, explode)
    harness.step()
    if method == "contain":
        harness.executor.fail = lambda grant: grant.request_id == "bad"
    if method == "finish":
        output = harness.engine.abort("bad")
        assert output is not None and output.finished
        harness.take([output])
    harness.run()
    assert "Panic: oops" in (harness.outputs["bad"].error or "")
    assert [output.finish_reason for output in harness.outputs["bad"].outputs] == ["error"]
    assert harness.tokens("good") == expected([4, 5, 6], 4)
    assert harness.engine.num_requests == 0


def test_a_listener_that_raises_is_called_no_more() -> None:
    harness = Harness()
    heard: list[Event] = []

    def deaf(event: Event) -> None:
        heard.append(event)
        raise OSError("the pipe is closed")

    harness.engine.events.subscribe(deaf)
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.run()
    assert harness.tokens("a") == expected([1, 2, 3], 4) and len(heard) == 1


def test_the_failure_of_a_search_is_an_event() -> None:
    """A search that finds no continuation ends itself, with an error."""
    harness = Harness()
    params = BeamSearchParams(beam_width=2, max_tokens=5)
    request = RequestSpec("search", (1, 2), params.sampling, seed=0, max_tokens=5, beams=params)
    search = BeamCoordinator(request)
    harness.engine.add(search)
    search.update = lambda results: search.finish("error", "no beam can go on")  # type: ignore[method-assign]
    harness.run()
    (event,) = harness.engine.events.of(EventKind.FAILED)
    assert event.request_id == "search" and event.detail == "no beam can go on"
    assert not harness.engine.events.of(EventKind.FINISHED)


def test_events_say_how_a_request_ended() -> None:
    harness = Harness()
    harness.add("long", [1, 2], max_tokens=3)
    harness.add("stopped", [1, 2], max_tokens=9, stop_token_ids=expected([1, 2], 3)[2:3])
    harness.add("aborted", [1, 2], max_tokens=50)
    harness.step()
    harness.engine.abort("aborted")
    harness.run()
    ends = {event.request_id: event.reason for event in harness.engine.events.of(EventKind.FINISHED)}
    assert ends == {"long": "length", "stopped": "stop", "aborted": "abort"}
