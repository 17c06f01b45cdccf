"""A person beside a document that is read: verdicts, other words, and an end to reading."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from octavo.core.errors import InvalidRequestError
from octavo.core.margins import (
    AnswerBegun,
    AnswerNow,
    Judge,
    MarginDecided,
    MarginWritten,
    ReviewBegun,
    SegmentRead,
    StopReading,
)
from tests.coordinators.reading import (
    WHOLE,
    Reading,
    alone,
    check,
    make_spec,
)


def test_review() -> None:
    """The answer waits until every margin was judged, or until it is told not to."""
    spec = make_spec(random.Random(21), num_segments=4, **WHOLE)
    spec = replace(spec, review=True)
    verdicts = {0: (True, "mine"), 1: (False, None), 2: (True, None), 3: (False, None)}

    def judge(index: int, text: str, kept: bool) -> tuple[str, bool]:
        keep, new = verdicts[index]
        return (new or text, keep) if text else (text, kept)

    harness = Reading(random.Random(0), num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    for _ in range(20):
        harness.step()
    assert not told.of(AnswerBegun) and not harness.engine.has_unfinished_requests
    written = {event.margin.segment.index: event.margin for event in told.of(MarginWritten)}
    for index, (keep, text) in verdicts.items():
        if written[index].text:
            assert harness.engine.call("margins", [Judge(0, index, keep, text)]) == [None]
    harness.finish()
    check(told, spec, expected=alone(spec, judge=judge))


def test_review_ends_when_told() -> None:
    spec = replace(make_spec(random.Random(22), **WHOLE), review=True)
    harness = Reading(num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    assert harness.engine.call("margins", [AnswerNow()]) == [None]
    harness.finish()
    check(told, spec)


def test_a_verdict_in_passing() -> None:
    """Without review a person may be faster than the answer; what comes too late is refused."""
    spec = make_spec(
        random.Random(23), num_segments=4, early_exit_kept=None, early_exit_score=None, classification="score"
    )
    harness = Reading(num_blocks=200, max_num_batched_tokens=8)
    told = harness.read(spec)
    (refused,) = harness.engine.call("margins", [Judge(0, 0, True)])
    assert isinstance(refused, InvalidRequestError) and refused.field == "segment"
    harness.until(lambda: bool(told.of(MarginWritten)))
    index = told.of(MarginWritten)[0].margin.segment.index
    assert harness.engine.call("margins", [Judge(0, index, True, "mine")]) == [None]
    (refused,) = harness.engine.call("margins", [AnswerNow()])
    assert isinstance(refused, InvalidRequestError) and refused.field == "review"
    harness.finish()
    got = told.result()
    assert got.margins[index][:2] == ("mine", True)
    assert got.margins[:index] + got.margins[index + 1 :] == [
        one for number, one in enumerate(alone(spec).margins) if number != index
    ]


def test_what_cannot_be_kept() -> None:
    """Room is kept for so many margins as may be kept by the rules; an empty one needs a text."""
    spec = make_spec(random.Random(25), num_segments=5, classification="score", early_exit_score=None, review=True)
    spec = replace(spec, early_exit_kept=2, threshold=99.0)
    harness = Reading(num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    margins = [event.margin for event in told.of(MarginDecided)]
    full = sorted(margin.segment.index for margin in margins if margin.text)
    for margin in margins:
        if not margin.text:
            (refused,) = harness.engine.call("margins", [Judge(0, margin.segment.index, True)])
            assert refused.field == "segment" and "is empty" in refused.problem
    assert harness.engine.call("margins", [Judge(0, full[0], True)]) == [None]
    assert harness.engine.call("margins", [Judge(0, full[1], True)]) == [None]
    (refused,) = harness.engine.call("margins", [Judge(0, full[2], True)])
    assert isinstance(refused, InvalidRequestError) and "early_exit_kept=2 allows no more" in refused.problem
    harness.engine.call("margins", [AnswerNow()])
    harness.finish()
    assert told.error is None and [one[0] for one in told.result().margins if one[1]] == [
        margin.text for margin in sorted(margins, key=lambda one: one.segment.index) if margin.segment.index in full[:2]
    ]


@pytest.mark.parametrize("steps", range(0, 30, 3))
def test_stop_reading(steps: int) -> None:
    """What was read stays, and margins that are decided; at least one segment."""
    spec = make_spec(random.Random(24), num_segments=6, num_questions=2, **WHOLE)
    harness = Reading(random.Random(steps), num_blocks=200, max_num_batched_tokens=8)
    told = harness.read(spec)
    for _ in range(steps):
        harness.step()
    joining = {event.question for event in told.of(AnswerBegun)}
    if harness.engine.num_requests:
        harness.engine.call("margins", [StopReading()])
        harness.step()
        read = len(told.of(SegmentRead))
        harness.finish()
        assert told.error is None
        for question in range(2):
            (begun,) = [event for event in told.of(AnswerBegun) if event.question == question]
            assert 1 <= begun.num_segments <= max(read, 1) or question in joining
            end = len(spec.prefix) + spec.segments[begun.num_segments - 1].last_token
            assert list(begun.prompt_token_ids[:end]) == [*spec.prefix, *spec.document][:end]
