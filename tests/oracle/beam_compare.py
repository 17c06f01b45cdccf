"""The rule by which two programs' beam searches count as equal, and what each program decided step by step.

A divergence is excused only where the two scores that decided it are within 1e-4 in both programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from octavo.coordinators.beam_group import BeamGroup
from octavo.coordinators.beams import BeamCoordinator

CLOSE = 1e-4
Tokens = tuple[int, ...]
Scored = tuple[Tokens, float]  # generated tokens, and a score
Trace = list[list[Scored]]  # per step the ranked candidates with their sums of log-probabilities, best first


@dataclass
class BeamTally:
    """What several comparisons found. Counts: a comparison that met nothing has shown nothing."""

    tolerance: float  # of a score, as a share of it, or absolute below 1
    searches: int = 0
    hypotheses: int = 0
    stopped: int = 0  # hypotheses that an end token ended
    early: int = 0  # searches that ended before max_tokens
    worst: float = 0.0
    excused: list[str] = field(default_factory=list)

    def same(self, what: str, ours: Sequence[Scored], theirs: Sequence[Scored]) -> bool:
        """Count a search; whether all hypotheses are equal, in order. Raises AssertionError if a score differs."""
        self.searches += 1
        self.hypotheses += len(ours)
        if [tokens for tokens, _ in ours] != [tokens for tokens, _ in theirs]:
            return False
        for (_, our_score), (_, their_score) in zip(ours, theirs, strict=True):
            share = abs(our_score - their_score) / max(1.0, abs(their_score))
            self.worst = max(self.worst, share)
            assert share <= self.tolerance, f"{what}: score {our_score} for {their_score}"
        return True

    def excuse(self, what: str, ours: Trace, theirs: Trace, our_end: Sequence[Scored], end: Sequence[Scored]) -> None:
        """Raises AssertionError unless the first difference was decided by scores too close to call."""
        step, place, pairs = _first_difference([*ours, list(our_end)], [*theirs, list(end)])
        mine, other = pairs[0][place][0], pairs[1][place][0]
        gaps = [abs(_score_of(mine, row) - _score_of(other, row)) for row in pairs]
        note = f"{what}: step {step}, rank {place}: {mine[-3:]} for {other[-3:]}, gaps {gaps[0]:.1e} and {gaps[1]:.1e}"
        assert max(gaps) <= CLOSE, note
        self.excused.append(note)
        print("excused:", note)

    def finish(self) -> None:
        print(
            f"{self.searches} searches, {self.early} ended early, {self.hypotheses} hypotheses, {self.stopped} by an "
            f"end token; worst score {self.worst:.1e}; excused {len(self.excused)}"
        )
        assert len(self.excused) <= 0.02 * self.searches


def _first_difference(ours: Trace, theirs: Trace) -> tuple[int, int, tuple[list[Scored], list[Scored]]]:
    """Step, rank and the two programs' candidates there. The last entries are the results."""
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        for place, ((a, _), (b, _)) in enumerate(zip(mine, other, strict=False)):
            if a != b:
                return step, place, (mine, other)
    raise AssertionError("one search ended before the other without a different candidate")


def _score_of(tokens: Tokens, row: list[Scored]) -> float:
    """A candidate's score; one that is not listed scores at most what the last one does."""
    return next((score for candidate, score in row if candidate == tokens), row[-1][1])


@contextmanager
def their_trace(model: Any) -> Iterator[Trace]:
    """What transformers' beam search ranks while this is open, for a batch of one."""
    trace: Trace = []
    original = model._get_top_k_continuations

    def traced(*, cur_len: int, decoder_prompt_len: int, **arguments: Any) -> Any:
        result = original(cur_len=cur_len, decoder_prompt_len=decoder_prompt_len, **arguments)
        tokens = result[1][0, :, decoder_prompt_len : cur_len + 1].tolist()
        trace.append([(tuple(row), score) for row, score in zip(tokens, result[0][0].tolist(), strict=True)])
        return result

    model._get_top_k_continuations = traced
    try:
        yield trace
    finally:
        del model._get_top_k_continuations


@contextmanager
def our_traces() -> Iterator[dict[str, Trace]]:
    """The same of our searches without groups, by request id."""
    traces: dict[str, Trace] = {}
    step, advance = BeamCoordinator._step, BeamGroup.advance
    latest: list[Any] = []

    def traced_advance(self: Any, ranked: Any, whats: Any) -> Any:
        latest[:] = ranked
        return advance(self, ranked, whats)

    def traced_step(self: Any, group: Any, answers: Any, chosen: Any) -> Any:
        before = [tuple(self._generated(beam.sequence)) for beam in group.beams]
        result = step(self, group, answers, chosen)
        trace = traces.setdefault(self.request_id, [])
        trace.append([((*before[candidate.beam], candidate.token_id), candidate.score) for candidate in latest])
        return result

    BeamCoordinator._step, BeamGroup.advance = traced_step, traced_advance  # type: ignore[method-assign]
    try:
        yield traces
    finally:
        BeamCoordinator._step, BeamGroup.advance = step, advance  # type: ignore[method-assign]
