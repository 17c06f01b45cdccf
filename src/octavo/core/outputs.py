"""What a user gets back. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token, of the raw logits."""

    logprob: float  # natural logarithm
    rank: int  # 1 is the most probable
    decoded_token: str | None = None  # the token alone as text


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` outputs."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # when logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # one dict per token of `token_ids`
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while running
    stop_reason: int | str | None = None  # the stop string or stop token id; None for an end token or the length

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the engine's monotonic clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_generated_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """State of one request: final from `generate`, or one of several when streaming."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first token
    seed: int | None = None  # the seed used: the request's, or the one drawn for it
    num_cached_tokens: int = 0  # prompt tokens whose KV was not computed for this request
    error: str | None = None  # why the request failed, when finish_reason is "error"
    system_fingerprint: str | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
