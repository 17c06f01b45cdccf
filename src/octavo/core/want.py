"""What a granted range is to give back besides KV: the five wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.core.params import SamplingParams
    from octavo.core.token_counts import TokenCounts


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of a token from a row."""

    params: SamplingParams
    seed: int  # resolved: never None, in [0, 2**64)
    stream: tuple[int, ...]  # path fixed by the request (sample index, fork, margin); keys the noise with the position
    num_prompt_tokens: int  # tokens of the sequence from here on are "output" for penalties, bad_words and min_tokens
    counts: TokenCounts | None = None  # attached to the sequence; None unless a penalty needs it
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of params.bad_words, every spelling of each
    end_token_ids: tuple[int, ...] = ()  # cannot be drawn while fewer than params.min_tokens were
    no_repeat_ngram_size: int = 0  # no n-gram of so many tokens comes twice, the prompt's included; 0: off


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw one token per draw from the last row; one row may feed many draws."""

    draws: tuple[Draw, ...]


@dataclass(frozen=True, slots=True)
class TopK:
    """The `k` best tokens of the last row by log-probability after the draw's processors (beam search).

    The log-softmax is taken first and the processors then act on log-probabilities, without renormalising, as
    transformers' beam search does.
    """

    k: int
    draw: Draw
    logprobs: int | None = None  # not None: each candidate's log-probability of the raw logits, and so many best ones


@dataclass(frozen=True, slots=True)
class Score:
    """For each set of token ids, the logarithm of its probability mass under the last row (raw logits)."""

    sets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states of the last row after these layers, float32 [hidden_size] each; 0 is the embedding."""

    layers: tuple[int, ...]


Want = Sample | TopK | Score | Hidden  # and None: nothing


@dataclass(frozen=True, slots=True)
class NextLogprobs:
    """For every granted row from `start` on but the sequence's last: the log-probability and rank of the token that
    follows it, and the `top` best tokens (prompt_logprobs). It stands beside a Want, which speaks of the last row
    alone."""

    top: int
    start: int = 0  # rows at positions before this one are not asked: their KV may come from the prefix cache
