"""The contract of a step: what the scheduler asks of the executor, and what comes back.

Both are values: ids, ints, tuples of tokens, frozen parameters. Nothing in a plan changes while its step is under way,
so it can be recorded, carried out again, or sent to another process.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
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
    token_ids: tuple[int, ...] = ()  # of the block


class Grant(NamedTuple):
    """Positions [start, stop) of one sequence, to be computed in this step.

    The last `num_drafts` of its tokens are guesses that the sequence does not have. Their rows are wanted like that of
    the token before them, each with the history of the guesses up to it: so they verify each other. One draws for all
    of them, so the last rows with draws are the last token's and theirs, in this order.

    With `draft_parents` they form a tree: several may follow the same token. Each lies in a slot of its own, as if at
    the positions from the first of them on, and has the position of its depth; it sees what it follows. Those that come
    true are moved to their positions by whoever carries the plan out, before he returns.
    """

    request_id: str  # of the request that owns the sequence
    sequence_id: int
    start: int
    stop: int
    token_ids: tuple[int, ...]  # at these positions
    block_table: tuple[int, ...]  # as of this step; covers positions [0, stop)
    wants: tuple[Wanted, ...] = ()  # of rows of this grant
    num_drafts: int = 0
    num_lookahead: int = 0  # tokens to be guessed after this step; the table has room for what is kept of them
    draft_parents: tuple[int, ...] = ()  # of each the number of the one it follows, -1: the last token; (): a chain

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def first_draft(self) -> int:
        """Position of the first draft, as its slot has it."""
        return self.stop - self.num_drafts

    def position_of_draft(self, number: int) -> int:
        if not self.draft_parents:
            return self.first_draft + number
        depth, parent = 0, self.draft_parents[number]
        while parent >= 0:
            depth, parent = depth + 1, self.draft_parents[parent]
        return self.first_draft + depth

    @property
    def draft_depth(self) -> int:
        """How many drafts follow each other: most that can come true."""
        places = (self.position_of_draft(number) - self.first_draft for number in range(self.num_drafts))
        return self.num_drafts if not self.draft_parents else 1 + max(places)

    def without_drafts(self) -> Grant:
        """The same as it would be if nobody had guessed."""
        stop = self.first_draft
        wants = tuple(wanted for wanted in self.wants if wanted.stop <= stop)
        token_ids = self.token_ids[: stop - self.start]
        return self._replace(
            stop=stop, token_ids=token_ids, wants=wants, num_drafts=0, num_lookahead=0, draft_parents=()
        )


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
    guess: tuple[int, ...] = ()  # of a draft model or head: what may follow the last token that was drawn
    guess_chances: tuple[float, ...] = ()  # how sure it is of each, or nothing


def accepted_drafts(grant: Grant, rows: SequenceOf[RowResult]) -> tuple[int, ...]:
    """The numbers of a grant's drafts that are what was drawn in their places, the first first. The token drawn after
    the last of them is the next one: so a verified sequence is the one that would have been drawn token by token."""
    if not grant.num_drafts:
        return ()
    drawn = [row.draws[0].token_id for row in rows if row.draws][-grant.num_drafts - 1 :]
    drafts, parents = grant.drafts, grant.draft_parents
    accepted: list[int] = []
    last = -1
    while last + 1 < len(drawn):
        following = [n for n, parent in enumerate(parents) if parent == last] if parents else [last + 1]
        right = [n for n in following if n < len(drafts) and drafts[n] == drawn[last + 1]]
        if not right:
            break
        last = right[0]
        accepted.append(last)
    return tuple(accepted)


def num_accepted(grant: Grant, rows: SequenceOf[RowResult]) -> int:
    return len(accepted_drafts(grant, rows))


@dataclass(frozen=True, slots=True)
class StepResult:
    results: tuple[GrantResult, ...]  # one per grant, in the plan's order
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of the step
