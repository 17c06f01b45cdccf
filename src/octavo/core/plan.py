"""The contract of a step: what the scheduler asks of the executor, and what comes back.

Both are values: ids, ints, tuples of tokens, frozen parameters. Nothing in a plan changes while its step is under way,
so it can be recorded, carried out again, or sent to another process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from octavo.core.want import Wanted


class BlockCopy(NamedTuple):
    """Copy the KV of a whole block, in all layers. The copies of a step are done in order, before any KV is written."""

    source: int
    target: int


class BlockLoad(NamedTuple):
    """Put KV that was kept elsewhere into a block. The loads of a step are done after its copies."""

    block: int
    kv: bytes  # as the executor's own `read_block` gave it


class Grant(NamedTuple):
    """Positions [start, stop) of one sequence, to be computed in this step.

    The last `num_drafts` of its tokens are guesses that the sequence does not have. Their rows are wanted like that of
    the token before them, each with the history of the guesses up to it: so they verify each other.
    """

    request_id: str  # of the request that owns the sequence
    sequence_id: int
    start: int
    stop: int
    token_ids: tuple[int, ...]  # at these positions
    block_table: tuple[int, ...]  # as of this step; covers positions [0, stop)
    wants: tuple[Wanted, ...] = ()  # of rows of this grant
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    def without_drafts(self) -> Grant:
        """The same as it would be if nobody had guessed."""
        stop = self.stop - self.num_drafts
        wants = tuple(wanted for wanted in self.wants if wanted.stop <= stop)
        return self._replace(stop=stop, token_ids=self.token_ids[: stop - self.start], wants=wants, num_drafts=0)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One ragged batch."""

    step: int  # counts from 0
    grants: tuple[Grant, ...]
    copies: tuple[BlockCopy, ...] = ()  # copy on write
    loads: tuple[BlockLoad, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.grants or self.copies or self.loads)

    @property
    def num_tokens(self) -> int:
        return sum(grant.num_tokens for grant in self.grants)


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float  # natural logarithm, of the raw logits
    rank: int  # 1 is the most probable; ties go to the lower id


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token that was drawn or given, and the best alternatives at its position."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()  # best first


class DrawResult(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None = None  # when the draw's params ask for them


class RowResult(NamedTuple):
    """What one row gave, of one want."""

    position: int
    draws: tuple[DrawResult, ...] = ()  # Sample: in the order of its draws
    candidates: tuple[tuple[int, float], ...] = ()  # TopK: (token id, processed log-probability), best first
    candidate_logprobs: tuple[TokenLogprobs, ...] = ()  # TopK: beside the candidates, when asked for
    scores: tuple[float, ...] = ()  # Score: log-probability of each set
    hidden: tuple[Any, ...] = ()  # Hidden: float32 arrays [hidden_size], in the order asked
    logprobs: TokenLogprobs | None = None  # NextLogprobs


class GrantResult(NamedTuple):
    """What one grant gave. `error` is set when this grant alone failed; then nothing of it is committed."""

    rows: tuple[RowResult, ...] = ()  # want by want, row by row
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    results: tuple[GrantResult, ...]  # one per grant, in the plan's order
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of the step
