"""What the coordinators that generate text have in common: outputs, streaming them, and ending."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from octavo.coordinators.completion import Completion, CompletionRequest, PromptLogprobs
from octavo.core.coordinator import Coordinator
from octavo.core.events import Reason
from octavo.core.namespace import Namespace
from octavo.core.outputs import RequestMetrics, RequestOutput
from octavo.core.params import OutputKind
from octavo.core.plan import DrawResult
from octavo.core.sequence import Sequence


class GeneratingCoordinator(Coordinator):
    """Base of `single` and `samples`: one Completion per output."""

    def __init__(self, request: CompletionRequest, metrics: RequestMetrics) -> None:
        super().__init__(request.request_id, request.priority, metrics)
        self.request = request
        self.namespace = Namespace(request.cache_salt)
        self.reads_cache = not request.params.skip_reading_prefix_cache
        self.completions = [Completion(request, index) for index in range(request.params.n)]
        self.prompt_logprobs = PromptLogprobs(request)
        self.error: str | None = None
        self._shown_prompt = list(request.prompt_token_ids)  # the user's to change; the request's own is not
        self._last_finish_reason: str | None = None
        self._prompt_logprobs_sent = False

    def take(self, index: int, draws: SequenceOf[DrawResult], sequence: Sequence) -> None:
        completion = self.completions[index]
        self.metrics.num_generated_tokens += completion.take(draws, sequence)
        if completion.finish_reason is not None:
            self._last_finish_reason = completion.finish_reason
            self.drop(sequence)

    def finish(self, reason: str, error: str | None = None) -> None:
        self.error = error
        self._last_finish_reason = reason
        for completion in self.completions:
            completion.finish(reason)

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    @property
    def end_reason(self) -> Reason:
        return Reason(self._last_finish_reason or "")

    def take_output(self, now: float) -> RequestOutput | None:
        if self.metrics.first_token_time is None and self.metrics.num_generated_tokens:
            self.metrics.first_token_time = now
        kind = self.request.params.output_kind
        if kind is OutputKind.FINAL_ONLY and not self.finished:
            return None
        changed = [completion for completion in self.completions if completion.is_new]
        if not changed and not self.finished:
            return None
        prompt_logprobs = None if self._prompt_logprobs_sent else self.prompt_logprobs.take()
        self._prompt_logprobs_sent = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self._shown_prompt,
            outputs=[completion.output() for completion in changed],
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            seed=self.request.seed,
            num_cached_tokens=self.metrics.num_cached_tokens,
            error=self.error,
            system_fingerprint=self.request.system_fingerprint,
            metrics=replace(self.metrics),
        )
