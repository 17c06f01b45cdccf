"""The hidden states of a prompt, made one vector."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from octavo.core.coordinator import Coordinator, NewSequence, SequenceResult
from octavo.core.events import Reason
from octavo.core.outputs import RequestMetrics
from octavo.core.pooling import PoolingOutput, PoolingSpec
from octavo.core.want import FINAL, Hidden, Wanted


class PoolingCoordinator(Coordinator):
    """A mean wants every row of the prompt, so it reads nothing cached; its rows are added one by one in their order,
    so that the sum is the same however the prompt is cut."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__(spec.request_id, spec.priority, RequestMetrics(spec.arrival_time))
        self.spec = spec
        self.namespace = spec.namespace
        self.reads_cache = spec.params.pooling == "last"
        self._sum: Any = None  # float64 [hidden_size]
        self._num_added = 0  # rows from the first on: a preempted prompt delivers some twice
        self._end: str | None = None
        self.error: str | None = None

    def start(self, new_sequence: NewSequence) -> None:
        sequence = new_sequence(())
        self.sequences.append(sequence)
        last = len(self.spec.prompt_token_ids)
        first = 0 if self.spec.params.pooling == "mean" else last - 1
        self._num_added = first
        sequence.extend(self.spec.prompt_token_ids, rows=(Wanted(first, last, Hidden((FINAL,))),))

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        for result in results:
            for row in result.rows:
                if row.position == self._num_added:
                    state = row.hidden[0].astype("float64")
                    self._sum = state if self._sum is None else self._sum + state
                    self._num_added += 1
        if self._num_added == len(self.spec.prompt_token_ids):
            self._end = "stop"
            self.drop_all()

    def finish(self, reason: str, error: str | None = None) -> None:
        self._end, self.error = reason, error

    @property
    def finished(self) -> bool:
        return self._end is not None

    @property
    def end_reason(self) -> Reason:
        return Reason(self._end or "")

    def take_output(self, now: float) -> PoolingOutput | None:  # type: ignore[override]
        if not self.finished:
            return None
        embedding: list[float] = []
        if self._end == "stop":
            count = len(self.spec.prompt_token_ids) if self.spec.params.pooling == "mean" else 1
            embedding = (self._sum / count).tolist()
        error = self.error if self._end == "stop" else self.error or f"ended by {self._end!r}"
        return PoolingOutput(self.request_id, embedding, True, error, replace(self.metrics))
