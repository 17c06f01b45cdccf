"""n outputs of one prompt. The prompt is computed once and its last row feeds all first draws. Then each output goes on
in a fork that shares the prompt's blocks (copy on write for the last one, if it is part full)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from octavo.coordinators.completion import grammar_state
from octavo.coordinators.generating import GeneratingCoordinator
from octavo.core.coordinator import NewSequence, SequenceResult
from octavo.core.plan import DrawResult
from octavo.core.sequence import Sequence
from octavo.core.token_counts import TokenCounts
from octavo.core.want import Sample


class SamplesCoordinator(GeneratingCoordinator):
    def start(self, new_sequence: NewSequence) -> None:
        prompt = new_sequence(())
        self.sequences.append(prompt)
        draws = tuple(completion.draw for completion in self.completions)
        prompt.extend(self.request.prompt_token_ids, want=Sample(draws), rows=self.request.prompt_rows())
        if self.request.params.has_penalties:
            prompt.attach(TokenCounts(self.request.prompt_token_ids))  # each fork has its own
        if (grammar := grammar_state(self.request, self.codec)) is not None:
            prompt.attach(grammar)

    @property
    def width(self) -> int:  # type: ignore[override]
        return sum(completion.finish_reason is None for completion in self.completions)

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        for result in results:
            self.prompt_logprobs.put(result.rows)
            draws = result.draws
            if draws and result.sequence.stream == ():
                self._branch(result.sequence, draws)
            elif draws:
                self.append_draws(result.sequence.stream[0], draws, result.sequence)

    def _branch(self, prompt: Sequence, draws: SequenceOf[DrawResult]) -> None:
        """Every output gets its own fork of the prompt and its first token."""
        branches = [prompt.fork(prompt.num_tokens, (completion.index,)) for completion in self.completions]
        self.drop(prompt)
        self.sequences.extend(branches)
        for completion, branch, drawn in zip(self.completions, branches, draws, strict=True):
            completion.attach_to(branch)
            self.append_draws(completion.index, [drawn], branch)
