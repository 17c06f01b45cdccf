"""A plain completion: one sequence, one output."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from octavo.coordinators.generating import GeneratingCoordinator
from octavo.core.coordinator import NewSequence, SequenceResult


class SingleCoordinator(GeneratingCoordinator):
    def start(self, new_sequence: NewSequence) -> None:
        sequence = new_sequence((0,))
        self.sequences.append(sequence)
        completion = self.completions[0]
        sequence.extend(self.request.prompt_token_ids, want=completion.want, rows=self.request.prompt_rows())
        completion.attach_to(sequence)

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        for result in results:
            self.prompt_logprobs.put(result.rows)
            self.append_draws(0, result.draws, result.sequence)
