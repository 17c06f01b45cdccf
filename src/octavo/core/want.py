"""What a row of a granted range is to give back besides KV: the wants. All of them are values.

Named tuples, as in `plan`: each step makes some for every row, and a frozen dataclass takes four times as long to make.
Which kind one is says isinstance, never ==.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo.core.grammar import Mask
    from octavo.core.params import SamplingParams


class Counts(NamedTuple):
    """The tokens before a row, as penalties see them."""

    prompt: frozenset[int]
    output: tuple[tuple[int, int], ...]  # (token id, occurrences), each at least 1


@dataclass(frozen=True, slots=True)
class History:
    """What a draw's processors need of the tokens before its row."""

    forbidden: tuple[int, ...] = ()  # by bad_words and min_tokens: cannot be drawn
    token_ids: tuple[int, ...] = ()  # all of them; empty unless no_repeat_ngram_size looks at them
    counts: Counts | None = None  # None unless a penalty needs them
    mask: Mask | None = None  # of a grammar: what else cannot be drawn


class Draw(NamedTuple):
    """One draw of a token from a row."""

    params: SamplingParams
    seed: int  # resolved: never None, in [0, 2**64)
    stream: tuple[int, ...]  # path fixed by the request (sample index, fork, margin); keys the noise with the position
    num_prompt_tokens: int  # tokens of the sequence from here on are "output" for penalties, bad_words and min_tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of params.bad_words, every spelling of each
    end_token_ids: tuple[int, ...] = ()  # cannot be drawn while fewer than params.min_tokens were
    no_repeat_ngram_size: int = 0  # no n-gram of so many tokens comes twice, the prompt's included; 0: off
    history: History | None = None  # in a plan, of its row; None: no processor needs any

    def at(self, token_ids: SequenceOf[int], counts: Counts | None, mask: Mask | None = None) -> Draw:
        """The same draw of the row that follows `token_ids`, with the history that its processors need."""
        num_output = len(token_ids) - self.num_prompt_tokens
        too_early = bool(self.end_token_ids) and num_output < self.params.min_tokens
        if not (too_early or self.bad_words or self.no_repeat_ngram_size) and counts is None and mask is None:
            return self
        forbidden = list(self.end_token_ids) if too_early else []
        for word in self.bad_words:
            before = len(word) - 1
            if before <= num_output and tuple(token_ids[len(token_ids) - before :]) == word[:-1]:
                forbidden.append(word[-1])
        seen = tuple(token_ids) if self.no_repeat_ngram_size else ()
        return self._replace(history=History(tuple(forbidden), seen, counts, mask))


class Sample(NamedTuple):
    """Draw one token per draw; one row may feed many draws."""

    draws: tuple[Draw, ...]
    max_drafts: int = 0  # most tokens that may be guessed to follow the row's own, and be verified in the same step


class TopK(NamedTuple):
    """The `k` best tokens by log-probability after the draw's processors (beam search).

    The log-softmax is taken first and the processors then act on log-probabilities, without renormalising, as
    transformers' beam search does.
    """

    k: int
    draw: Draw
    logprobs: int | None = None  # not None: each candidate's log-probability of the raw logits, and so many best ones


class Score(NamedTuple):
    """For each set of token ids, the logarithm of its probability mass (raw logits)."""

    sets: tuple[tuple[int, ...], ...]


FINAL = -1  # the "layer" behind the last: its hidden states after the model's final norm


class Hidden(NamedTuple):
    """Hidden states after these layers, float32 [hidden_size] each; 0 is the embedding, FINAL comes after the norm."""

    layers: tuple[int, ...]


class NextLogprobs(NamedTuple):
    """The log-probability and rank of a given token, one for each row, and the `top` best tokens (prompt_logprobs)."""

    token_ids: tuple[int, ...]
    top: int

    def of_row(self, index: int) -> NextLogprobs:
        return NextLogprobs((self.token_ids[index],), self.top)


Want = Sample | TopK | Score | Hidden | NextLogprobs


class Wanted(NamedTuple):
    """Something wanted of each row of a range of positions."""

    start: int
    stop: int
    want: Want

    def within(self, start: int, stop: int) -> Wanted | None:
        """The part of it that is wanted of rows [start, stop)."""
        first, end = max(self.start, start), min(self.stop, stop)
        if first >= end:
            return None
        if isinstance(self.want, NextLogprobs):
            token_ids = self.want.token_ids[first - self.start : end - self.start]
            return Wanted(first, end, NextLogprobs(token_ids, self.want.top))
        return self if (first, end) == self[:2] else Wanted(first, end, self.want)
