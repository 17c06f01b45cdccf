"""Coordinators whose rows must all run in one step: together or not at all, and never for ever waiting."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest

from octavo.core.coordinator import Coordinator, NewSequence, SequenceResult
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, Reason
from octavo.core.outputs import RequestMetrics, RequestOutput
from octavo.core.params import SamplingParams
from octavo.core.want import Draw, TopK
from tests.engine.fake import Harness, expected, next_token


class Beams(Coordinator):
    """Fixed-width search over the fake model: row i keeps its own best candidate. Enough to need lockstep."""

    lockstep = True

    def __init__(self, name: str, prompt: list[int], width: int, steps: int) -> None:
        super().__init__(name, 0, RequestMetrics(0.0))
        self.width = width
        self.prompt, self.steps = prompt, steps
        self.results: list[list[int]] = []
        self.rows_per_step: list[int] = []
        self.ended: str | None = None
        self.want = TopK(width, Draw(SamplingParams(), 0, (), len(prompt)))

    def start(self, new_sequence: NewSequence) -> None:
        self.sequences.append(new_sequence(()))
        self.sequences[0].extend(self.prompt, self.want)

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        answered = [row.candidates for result in results for row in result.rows]
        if not answered:
            return
        self.rows_per_step.append(len(answered))
        if len(self.sequences) == 1 and self.width > 1:
            root = self.sequences[0]
            branches = [root.fork(root.num_tokens, (i,)) for i in range(self.width)]
            self.drop(root)
            self.sequences.extend(branches)
            tokens = [token for token, _ in answered[0]]
        else:
            tokens = [candidates[i][0] for i, candidates in enumerate(answered)]
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.extend([token], self.want)
        if self.sequences[0].num_tokens - len(self.prompt) == self.steps:
            self.ended = "length"
            self.results = [sequence.token_ids for sequence in self.sequences]

    def finish(self, reason: str, error: str | None = None) -> None:
        self.ended, self.error = reason, error

    @property
    def finished(self) -> bool:
        return self.ended is not None

    @property
    def end_reason(self) -> Reason:
        return Reason(self.ended or "")

    def take_output(self, now: float) -> RequestOutput | None:
        return RequestOutput(self.request_id, None, self.prompt, [], True) if self.finished else None


def alone(prompt: list[int], width: int, steps: int) -> list[list[int]]:
    rows = []
    for rank in range(width):
        tokens = list(prompt)
        for _ in range(steps):
            tokens.append(next_token(tokens, rank))
        rows.append(tokens)
    return rows


def test_rows_run_together_and_survive_preemption() -> None:
    """Restored beams wait for one another, share what they had in common, and end as alone."""
    harness = Harness(num_blocks=30, max_num_batched_tokens=16)
    harness.add("old", [1] * 20, max_tokens=70)
    harness.step()
    beams = Beams("beams", [2] * 24, width=4, steps=20)
    harness.engine.add(beams)
    harness.run()
    assert harness.engine.events.of(EventKind.PREEMPTED), "nothing was preempted: the test shows nothing"
    assert beams.results == alone([2] * 24, 4, 20)
    assert set(beams.rows_per_step[1:]) == {4}
    assert harness.tokens("old") == expected([1] * 20, 70)


def test_wider_than_a_step_is_refused_when_added() -> None:
    harness = Harness(max_num_seqs=4)
    with pytest.raises(InvalidRequestError, match="max_num_seqs=4"):
        harness.engine.add(Beams("wide", [1, 2], width=5, steps=3))
    assert not harness.engine.has_unfinished_requests


def test_what_cannot_go_on_ends_with_an_error_instead_of_waiting_for_ever() -> None:
    harness = Harness(num_blocks=6)
    beams = Beams("large", [3] * 8, width=4, steps=30)
    harness.engine.add(beams)
    harness.add("next", [1, 2], max_tokens=3)
    harness.run()
    assert beams.ended == "error" and "do not fit" in (beams.error or "")
    assert harness.tokens("next") == expected([1, 2], 3)
