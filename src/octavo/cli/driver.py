"""An engine stepped by hand, so that every step and every token can be timed and looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.build import build_engine
from octavo.core.params import OutputKind, SamplingParams
from octavo.runner.input_batch import logits_requests

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.core.outputs import CompletionOutput, RequestOutput
    from octavo.core.plan import StepPlan, StepResult

Request = tuple[list[int], SamplingParams]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: how long it took, and what was computed. The request's own work, its text too, is part of it."""

    started: float  # seconds, the engine's clock
    ended: float
    sequences: tuple[tuple[int, int], ...]  # per grant: tokens of context already cached, tokens computed
    logits_rows: int
    prompt_tokens: int  # of the tokens computed
    timings: Mapping[str, float]  # seconds of its parts, as the executor tells them


@dataclass(slots=True)
class Answer:
    """One request: its last output with all tokens, and when tokens came."""

    arrived: float  # seconds, the engine's clock
    output: RequestOutput | None = None
    token_times: list[float] = field(default_factory=list)  # of each token of all outputs, ascending


class EngineDriver:
    """Owns an engine. Raises what `build_engine` raises."""

    def __init__(self, config: EngineConfig) -> None:
        self.built = build_engine(config)
        self._frontend = self.built.frontend
        self._engine = self.built.engine
        self.clock = self._engine.clock

    def run(
        self,
        requests: Sequence[Request],
        on_plan: Callable[[StepPlan], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> list[Answer]:
        """Answer all requests at once. Raises InvalidRequestError; one that fails inside says so in its output."""
        made = [
            self._frontend.make({"prompt_token_ids": ids}, params.but(output_kind=OutputKind.CUMULATIVE))
            for ids, params in requests
        ]
        arrived = self.clock()
        answers = {request.spec.request_id: Answer(arrived) for request in made}
        readers = {request.spec.request_id: self._frontend.reader(request) for request in made}
        prompt_lens = {request.spec.request_id: len(request.spec.prompt_token_ids) for request in made}
        done: list[tuple[StepPlan, StepResult]] = []

        def listener(plan: StepPlan, result: StepResult) -> None:
            done.append((plan, result))

        self._engine.step_listeners.append(listener)
        try:
            for request in made:
                self._engine.add_request(request.spec)
            while self._engine.has_unfinished_requests:
                started = self.clock()
                outputs = self._engine.step()
                ended = self.clock()
                for output in outputs:
                    _note(answers[output.request_id], readers[output.request_id](output), ended)
                while done:  # nothing, if nothing could run
                    plan, result = done.pop()
                    if on_plan is not None:
                        on_plan(plan)
                    if on_step is not None:
                        on_step(_step(plan, result, started, ended, prompt_lens))
        finally:
            self._engine.step_listeners.remove(listener)
            for request in made:
                self._engine.abort(request.spec.request_id)
        return [answers[request.spec.request_id] for request in made]

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> EngineDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _note(answer: Answer, output: RequestOutput, now: float) -> None:
    new = output.metrics.num_generated_tokens - len(answer.token_times)
    answer.token_times += [now] * new
    answer.output = output


def _step(plan: StepPlan, result: StepResult, started: float, ended: float, prompt_lens: dict[str, int]) -> Step:
    return Step(
        started,
        ended,
        tuple((grant.start, grant.num_tokens) for grant in plan.grants),
        len({request.row for request in logits_requests(plan.grants)}),
        sum(max(min(grant.stop, prompt_lens[grant.request_id]) - grant.start, 0) for grant in plan.grants),
        result.timings,
    )


def completions(answer: Answer) -> list[CompletionOutput]:
    """The outputs of an answer. Raises RuntimeError with the engine's reason if the request failed."""
    if answer.output is None:
        raise RuntimeError("the request ended without an output")
    if answer.output.error is not None:
        raise RuntimeError(answer.output.error)
    return answer.output.outputs
