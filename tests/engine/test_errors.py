"""An error belongs to one request: it ends with a reason, its blocks go home, the others do not notice."""

from __future__ import annotations

import pytest

from octavo.core.events import EventKind
from octavo.core.plan import GrantResult, StepResult
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
    with pytest.raises(ValueError, match="in use"):
        harness.add("a", [1], max_tokens=5)


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
