"""What a user gets back. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token, of the raw logits."""

    logprob: float  # natural logarithm
    rank: int  # 1 is the most probable
    decoded_token: str | None = None  # the token alone as text, with its leading space; U+FFFD for part of a character
    bytes: list[int] | None = None  # the token alone as UTF-8, 0 to 255 each: joined, they give whole characters


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` outputs."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # when logprobs were asked for, and in beam search, there as processed
    logprobs: list[dict[int, Logprob]] | None = None  # one dict per token of `token_ids`
    finish_reason: str | None = None  # "stop", "length", "repetition", "abort" or "error"; None while running
    stop_reason: int | str | None = None  # the stop string or stop token id; "repetition_detected"; else None
    score: float | None = None  # beam search: cumulative_logprob / length ** length_penalty

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
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    num_draft_tokens: int = 0  # guessed, and verified in steps (speculative decoding)
    num_accepted_tokens: int = 0  # of these, tokens that came true: so many were not waited for


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


def joined_outputs(before: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    """What was new of one output, and what was new of it after that, as one."""
    logprobs = new.logprobs
    if before.logprobs is not None:
        logprobs = [*before.logprobs, *(logprobs or ())]
    text, token_ids = before.text + new.text, before.token_ids + new.token_ids
    return replace(new, text=text, token_ids=token_ids, logprobs=logprobs)


class OutputSoFar:
    """All of a request's outputs up to now, put together from what comes from the engine: what is new since the last.

    Not for users, who say by `output_kind` what they want to see.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, CompletionOutput] = {}
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def merge(self, new: RequestOutput) -> RequestOutput:
        """Everything so far. It is the caller's: it is not changed later."""
        for output in new.outputs:
            before = self._outputs.get(output.index)
            self._outputs[output.index] = output if before is None else joined_outputs(before, output)
        if new.prompt_logprobs is not None:
            self._prompt_logprobs = new.prompt_logprobs
        outputs = [
            replace(one, token_ids=list(one.token_ids), logprobs=None if one.logprobs is None else list(one.logprobs))
            for _, one in sorted(self._outputs.items())
        ]
        return replace(new, outputs=outputs, prompt_logprobs=self._prompt_logprobs)


@dataclass(slots=True)
class CacheStats:
    """Of KV, since the engine was built: what was computed, and what did not have to be. Work that is restored after a
    preemption counts as well."""

    query_tokens: int = 0  # tokens of requests when they began to run
    hit_tokens: int = 0  # of them, taken from the cache instead of computed
    forked_tokens: int = 0  # that forks had from the sequence they were forked from, instead of computing them
    computed_tokens: int = 0  # by steps: of prompts, of what was generated, and guesses
    inserted_blocks: int = 0
    evicted_blocks: int = 0
    loaded_blocks: int = 0  # from the file tier
    copied_blocks: int = 0  # on write

    @property
    def miss_tokens(self) -> int:
        return self.query_tokens - self.hit_tokens


@dataclass(frozen=True, slots=True)
class CacheExplanation:
    """What the prefix cache has of a prompt now, and why not more. Positions count tokens from 0."""

    num_tokens: int  # of the prompt
    num_cached_tokens: int  # in memory: that a request would not compute; the last token is always computed
    block_size: int  # only full blocks are cached; of one that goes on differently the first part is used
    reason: str  # one sentence: why it ends there
    first_difference: int | None = None  # position of the first token that differs from what an earlier request had
    token_id: int | None = None  # the prompt's, there
    earlier_token_id: int | None = None  # the earlier request's, there
    earlier_request_id: str | None = None  # who computed what is cached up to there, or who differs
    evicted_reason: str | None = None  # the next block was cached once: "capacity" or "reset"
    evicted_seconds_ago: float | None = None
    num_kept_tokens: int = 0  # that follow in kv_offload_dir: loaded, unless computing them is predicted to be faster


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the texts that a session's `select` compared: log p of its tokens, given everything before it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]  # natural logarithm, one per token, of the raw logits

    @property
    def total_logprob(self) -> float:
        """Log-probability of the text: a longer one is seldom the more probable."""
        return sum(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Normalised by length: per token."""
        return self.total_logprob / len(self.logprobs)


@dataclass(frozen=True, slots=True)
class SelectResult:
    """Choices in the order given; of equals the first is best."""

    choices: list[Choice]
    by: str  # "mean" or "total": what `best` goes by

    @property
    def best(self) -> Choice:
        return self.best_by_mean if self.by == "mean" else self.best_by_total

    @property
    def best_by_total(self) -> Choice:
        return max(self.choices, key=lambda choice: choice.total_logprob)

    @property
    def best_by_mean(self) -> Choice:
        return max(self.choices, key=lambda choice: choice.mean_logprob)
