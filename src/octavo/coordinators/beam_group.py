"""The rules of beam search over scores: those of transformers' `generate` without sampling, in float32 as there.

In each step the best continuations of all beams together are ranked. Those that end (an end token, a stop string, the
length) are finished if they are among the first `width` of the ranking, and forgotten if not; the best `width` of the
others go on. A finished hypothesis counts with its log-probability over length ** length_penalty.

transformers fills places for which there is nothing with copies that score -1e9, and may return them. Here such places
stay empty: a search over few tokens has fewer beams and fewer results.
"""

from __future__ import annotations

import heapq
import math
import struct
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = SequenceOf[tuple[int, float]]  # a beam's best continuations: token id and log-probability, best first
Hypothesis = TypeVar("Hypothesis")


def float32(value: float) -> float:
    """The nearest float32. Scores are added up in float32, so that ties and roundings are transformers'."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclass(slots=True)
class Candidate:
    """A beam and a token to continue it with."""

    beam: int  # index among the group's beams
    token_id: int
    score: float  # sum of log-probabilities, float32
    hit: bool = False  # whether a hypothesis ends with it


@dataclass(slots=True)
class Finished(Generic[Hypothesis]):
    score: float  # over length ** length_penalty, float32
    sum: float
    hypothesis: Hypothesis


class BeamGroup(Generic[Hypothesis]):
    """The state of one group's search: scores of the running beams and the finished hypotheses, best first."""

    def __init__(
        self, width: int, num_end_tokens: int, length_penalty: float, early_stopping: bool | str, max_tokens: int
    ) -> None:
        self.width = width
        # So many that `width` can go on even if every beam's best continuations are end tokens.
        self.num_candidates = max(2, 1 + num_end_tokens) * width
        self.scores = [0.0]  # of the running beams; at first there is one, the prompt
        self.finished: list[Finished[Hypothesis]] = []
        self.ended = False
        self.length = 0  # tokens generated
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._max_tokens = max_tokens
        self._improvable = True

    def rank(self, rows: SequenceOf[Row]) -> list[Candidate]:
        """The best continuations of all beams, best first; `rows[i]` are those of beam i. None is impossible (-inf)."""

        def entry(beam: int, place: int) -> tuple[float, int, int, int]:
            token_id, logprob = rows[beam][place]
            return -float32(logprob + self.scores[beam]), beam, token_id, place

        heads = [entry(beam, 0) for beam in range(len(rows)) if rows[beam]]
        heapq.heapify(heads)
        ranked: list[Candidate] = []
        while heads and len(ranked) < self.num_candidates:
            negative, beam, token_id, place = heads[0]
            if negative == math.inf:
                break
            ranked.append(Candidate(beam, token_id, -negative))
            if place + 1 < len(rows[beam]):
                heapq.heapreplace(heads, entry(beam, place + 1))
            else:
                heapq.heappop(heads)
        return ranked

    def advance(self, ranked: SequenceOf[Candidate], hypotheses: dict[int, Hypothesis]) -> list[Candidate]:
        """Take a step: the candidates that go on as beams, best first, none when the search has ended.

        `hypotheses[i]` is what to keep of candidate i if it is finished; there is one for each of the first `width`
        hits.
        """
        running = [candidate for candidate in ranked if not candidate.hit][: self.width]
        full = len(self.finished) == self.width
        self.length += 1
        if self._improvable and not (full and self._early_stopping is True):
            for index, candidate in enumerate(ranked[: self.width]):
                if candidate.hit:
                    score = self.normalised(candidate.score, self.length)
                    self.finished.append(Finished(score, candidate.score, hypotheses[index]))
            self.finished.sort(key=lambda finished: -finished.score)  # stable: of equals the earlier one stays first
            del self.finished[self.width :]
        full = len(self.finished) == self.width
        if running:
            self.scores = [candidate.score for candidate in running]
            length = self.length
            if self._early_stopping == "never" and self._length_penalty > 0.0:
                length = self._max_tokens
            worst = self.finished[-1].score if full else -math.inf
            self._improvable = self._improvable and self.normalised(self.scores[0], length) > worst
        self.ended = not running or not self._improvable or (full and self._early_stopping is True)
        return [] if self.ended else running

    def normalised(self, score: float, length: int) -> float:
        return float32(score / float32(length**self._length_penalty))
