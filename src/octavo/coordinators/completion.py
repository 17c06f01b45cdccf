"""One output of a request: what was drawn so far, its text, and when it stops. Shared by coordinators that generate."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from octavo.core.grammar import GrammarState
from octavo.core.outputs import CompletionOutput, Logprob
from octavo.core.plan import DrawResult, RowResult, TokenLogprobs
from octavo.core.protocols import TextCodec, TextStream
from octavo.core.repetition import repeats
from octavo.core.request import RequestSpec
from octavo.core.sequence import Sequence
from octavo.core.token_counts import TokenCounts
from octavo.core.want import Draw, Sample


def draw_of(request: RequestSpec, stream: tuple[int, ...], no_repeat_ngram_size: int = 0) -> Draw:
    """A draw of a request's, from whatever row."""
    return Draw(
        params=request.params,
        seed=request.seed,
        stream=stream,
        num_prompt_tokens=len(request.prompt_token_ids),
        bad_words=request.bad_words,
        end_token_ids=request.end_token_ids,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )


def grammar_state(request: RequestSpec, codec: TextCodec | None) -> GrammarState | None:
    """Of one output of a request's that is to look like something."""
    params = request.params.grammar
    if params is None:
        return None
    if codec is None:
        raise ValueError("structured outputs need a codec")
    return codec.grammar_state(params)


def text_stream(request: RequestSpec, codec: TextCodec | None) -> TextStream | None:
    """For the text of one output of a request's; None where none is made."""
    params = request.params
    if codec is None or not params.detokenize:
        return None
    return codec.text_stream(
        request.prompt_token_ids,
        stop=tuple(params.stop or ()),
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        stop_after=params.min_tokens,
    )


class PromptLogprobs:
    """Log-probabilities of the prompt, put in place by position: a preempted prompt delivers some twice."""

    def __init__(self, request: RequestSpec) -> None:
        wanted = request.params.prompt_logprobs is not None
        self._entries: list[dict[int, Logprob] | None] | None = (
            [None] * len(request.prompt_token_ids) if wanted else None
        )

    def put(self, rows: SequenceOf[RowResult]) -> None:
        """The row at a position speaks of the token after it."""
        if self._entries is not None:
            for row in rows:
                if row.logprobs is not None:
                    self._entries[row.position + 1] = to_dict(row.logprobs)

    @property
    def entries(self) -> list[dict[int, Logprob] | None] | None:
        return self._entries


def to_dict(row: TokenLogprobs) -> dict[int, Logprob]:
    """vLLM's form: the token itself and the best ones, by token id."""
    entries = {entry.token_id: Logprob(entry.logprob, entry.rank) for entry in row.top}
    entries.setdefault(row.token.token_id, Logprob(row.token.logprob, row.token.rank))
    return entries


@dataclass(frozen=True, slots=True)
class Sent:
    """How much of an output has gone to the user."""

    tokens: int = 0
    chars: int = 0
    finished: bool = False


@dataclass(slots=True)
class Completion:
    """One output under way."""

    request: RequestSpec
    index: int
    codec: TextCodec | None = None  # None: no text is made
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text_stream: TextStream | None = None
    stream: tuple[int, ...] = ()  # of its draws; the index alone if none is given
    sent: Sent = Sent()
    draw: Draw = field(init=False)  # the stream is the sample's own, so that outputs differ and each is reproducible

    def __post_init__(self) -> None:
        self.stream = self.stream or (self.index,)
        self.draw = draw_of(self.request, self.stream)
        params = self.request.params
        if params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0
        self.text_stream = text_stream(self.request, self.codec)

    @property
    def want(self) -> Sample:
        """The next token; of those after it, as many may be guessed as the output has room for."""
        room = self.request.max_tokens - len(self.token_ids) - 1
        return Sample((self.draw,), room if room > 0 and self.request.params.speculative_decoding else 0)

    def attach_to(self, sequence: Sequence) -> None:
        """Let this output's state follow the sequence that carries it. Counts for penalties and the state of a grammar
        may do so already: those of the prompt, forked with it."""
        if self.text_stream is not None:
            sequence.attach(self.text_stream)
        if self.request.params.has_penalties and sequence.attached(TokenCounts) is None:
            sequence.attach(TokenCounts(self.request.prompt_token_ids))
        if self.request.params.grammar is not None and sequence.attached(GrammarState) is None:
            state = grammar_state(self.request, self.codec)
            assert state is not None
            sequence.attach(state)

    def append_draws(self, draws: SequenceOf[DrawResult], sequence: Sequence) -> int:
        """Append drawn tokens to the output and its sequence, up to one that ends it, or else ask for the next. Returns
        how many there were."""
        for number, drawn in enumerate(draws, 1):
            self._append(drawn, sequence)
            if self.finish_reason is not None:
                return number
        if draws:
            sequence.extend((), want=self.want)
        return len(draws)

    def _append(self, drawn: DrawResult, sequence: Sequence) -> None:
        self.token_ids.append(drawn.token_id)
        if self.logprobs is not None and drawn.logprobs is not None:
            self.logprobs.append(to_dict(drawn.logprobs))
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + drawn.logprobs.token.logprob
        if self._ends_at(drawn.token_id):
            # An end token is part of token_ids, and of the text only when the user wants to see it.
            if self.text_stream is not None and self.request.params.include_stop_str_in_output:
                self.text_stream.advance((drawn.token_id,))
            self.finish("stop", None if drawn.token_id in self.request.eos_token_ids else drawn.token_id)
            return
        sequence.extend((drawn.token_id,))
        if self.text_stream is not None and self.text_stream.stop_reason is not None:
            self.finish("stop", self.text_stream.stop_reason)
        elif self._is_complete(sequence):
            self.finish("stop")
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish("length")
        elif self._repeats():
            self.finish("repetition", "repetition_detected")

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether the output looks as it is to, and nothing may follow."""
        state = sequence.attached(GrammarState) if self.request.params.grammar is not None else None
        return state is not None and state.is_complete

    def _ends_at(self, token_id: int) -> bool:
        return len(self.token_ids) >= self.request.params.min_tokens and token_id in self.request.end_token_ids

    def _repeats(self) -> bool:
        params = self.request.params
        return (
            params.repetition is not None
            and len(self.token_ids) >= params.min_tokens
            and repeats(self.token_ids, params.repetition)
        )

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason
            if self.text_stream is not None:
                self.text_stream.finish()

    @property
    def is_new(self) -> bool:
        """Whether there is something that `output` has not given yet."""
        return len(self.token_ids) > self.sent.tokens or (self.finish_reason is not None and not self.sent.finished)

    def output(self) -> CompletionOutput:
        """What came since the last call."""
        sent = self.sent
        text = self.text_stream.text_after(sent.chars) if self.text_stream is not None else ""
        output = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[sent.tokens :],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[sent.tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self.sent = Sent(len(self.token_ids), sent.chars + len(text), self.finish_reason is not None)
        return output
