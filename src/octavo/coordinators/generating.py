"""What the coordinators that answer a request have in common: outputs, streaming them, and ending."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from octavo.coordinators.completion import Completion, PromptLogprobs
from octavo.core.coordinator import Coordinator
from octavo.core.events import Reason
from octavo.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.core.params import OutputKind
from octavo.core.plan import DrawResult
from octavo.core.protocols import TextCodec
from octavo.core.request import RequestSpec
from octavo.core.sequence import Sequence


class RequestCoordinator(Coordinator):
    """Base of all that answer a RequestSpec. `codec` makes text; None: none is made."""

    def __init__(self, request: RequestSpec, codec: TextCodec | None = None) -> None:
        super().__init__(request.request_id, request.priority, RequestMetrics(request.arrival_time))
        self.request = request
        self.codec = codec
        self.namespace = request.namespace
        self.reads_cache = not request.params.skip_reading_prefix_cache
        self.error: str | None = None
        self._end: str | None = None  # finish reason of the request; of several outputs, the last one's

    @property
    def end_reason(self) -> Reason:
        return Reason(self._end or "")

    def _note_first_token(self, now: float) -> None:
        if self.metrics.first_token_time is None and self.metrics.num_generated_tokens:
            self.metrics.first_token_time = now

    def _output(
        self,
        outputs: list[CompletionOutput],
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None,
    ) -> RequestOutput:
        """What goes to whoever waits. The prompt is left out: he has it."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=[],
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            seed=None if self.request.beams is not None else self.request.seed,
            num_cached_tokens=self.metrics.num_cached_tokens,
            error=self.error,
            metrics=replace(self.metrics),
        )


class GeneratingCoordinator(RequestCoordinator):
    """Base of `single` and `samples`: one Completion per output."""

    def __init__(self, request: RequestSpec, codec: TextCodec | None = None) -> None:
        super().__init__(request, codec)
        self.completions = [Completion(request, index, codec) for index in range(request.params.n)]
        self.prompt_logprobs = PromptLogprobs(request)
        self._prompt_logprobs_sent = False

    def append_draws(self, index: int, draws: SequenceOf[DrawResult], sequence: Sequence) -> None:
        completion = self.completions[index]
        self.metrics.num_generated_tokens += completion.append_draws(draws, sequence)
        if completion.finish_reason is not None:
            self._end = completion.finish_reason
            self.drop(sequence)

    def finish(self, reason: str, error: str | None = None) -> None:
        self.error = error
        self._end = reason
        for completion in self.completions:
            completion.finish(reason)

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def take_output(self, now: float) -> RequestOutput | None:
        self._note_first_token(now)
        if self.request.params.output_kind is OutputKind.FINAL_ONLY and not self.finished:
            return None
        changed = [completion for completion in self.completions if completion.is_new]
        if not changed and not self.finished:
            return None
        prompt_logprobs = None if self._prompt_logprobs_sent else self.prompt_logprobs.entries
        self._prompt_logprobs_sent = True
        return self._output([completion.output() for completion in changed], prompt_logprobs)
