"""A sequence: tokens, a table of KV blocks and attached state; and the verbs that act on it.

Nothing else touches KV. The verbs are called between steps, by coordinators; what they ask for is carried out in the
next steps under the scheduler's budget.

A position's KV is either committed (below `num_computed`) or not computed. The last token stays uncomputed until
something wants its row, so forking and then decoding, a full cache hit and n samples of a prompt are no special cases.
What is to be computed is a list of ranges of positions; the verbs there are now leave at most one, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from operator import is_
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from octavo.core.grammar import GrammarState
from octavo.core.token_counts import TokenCounts
from octavo.core.want import NextLogprobs, Sample, TopK, Wanted

if TYPE_CHECKING:
    from octavo.core.protocols import SequenceState
    from octavo.core.want import Draw, Want


State = TypeVar("State")
_DRAWN = (Sample, TopK)  # wants whose rows have a history
BlockTable = Any  # a list of block ids; what else the KV cache manager keeps in it is its own


class BlockTables(Protocol):
    """The part of the KV cache manager that verbs need. A table is a list of block ids, owned by one sequence."""

    def new_table(self) -> BlockTable: ...

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable: ...

    def truncate(self, table: BlockTable, num_tokens: int) -> None: ...

    def free(self, table: BlockTable) -> None: ...

    def remember_end(self, table: BlockTable, token_ids: list[int]) -> None: ...


class Sequence:
    """See the module. Made by the engine, for a coordinator, and by `fork`."""

    __slots__ = (
        "_attached",
        "_kv",
        "_new_id",
        "_wanted_stop",
        "asked",
        "block_table",
        "dropped",
        "exact_until",
        "id",
        "num_computed",
        "stream",
        "token_ids",
        "wants",
    )

    def __init__(
        self,
        seq_id: int,
        kv: BlockTables,
        new_id: SequenceIds,
        stream: tuple[int, ...] = (),
        block_table: BlockTable | None = None,
    ) -> None:
        self.id = seq_id  # unique in the engine, ascending in order of creation
        self.token_ids: list[int] = []
        self.block_table = kv.new_table() if block_table is None else block_table
        self.num_computed = 0  # KV of positions [0, num_computed) is committed
        # The first position whose KV was not computed by ordinary attention over all before it; None: there is none.
        self.exact_until: int | None = None
        self.asked = False  # a verb has asked for work that is not done yet
        self.wants: tuple[Wanted, ...] = ()  # of rows
        self._wanted_stop = 0  # the first position behind all of these
        self.stream = stream
        self.dropped = False
        self._attached: list[tuple[SequenceState, int]] = []  # (state, length of the sequence when it was attached)
        self._kv = kv
        self._new_id = new_id

    # --- what the scheduler reads ---

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def target(self) -> int:
        """Positions below this are to be computed: up to the last wanted row, or all but the last."""
        return self._wanted_stop if self.wants else max(len(self.token_ids) - 1, 0)

    @property
    def pending(self) -> tuple[range, ...]:
        """The positions that are to be computed, in this order."""
        if not self.asked or self.num_computed >= (target := self.target):
            return ()
        return (range(self.num_computed, target),)

    @property
    def num_pending(self) -> int:
        if not self.asked:
            return 0
        pending = self.target - self.num_computed
        return pending if pending > 0 else 0

    @property
    def is_generating(self) -> bool:
        """Whether all that is pending is its last token: it goes on in every step, token by token."""
        num_tokens = len(self.token_ids)
        return self.asked and self.num_computed == num_tokens - 1 and self.target == num_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether more is pending: a prompt, or what was preempted. Its rows can be cut into chunks, and be cached."""
        return self.asked and self.target > self.num_computed and not self.is_generating

    @property
    def first_wanted_row(self) -> int:
        """Rows from here on are computed for it, whatever is cached."""
        return min((wanted.start for wanted in self.wants), default=self.target)

    def wants_within(self, start: int, stop: int, drafts: SequenceOf[SequenceOf[int]] = ()) -> tuple[Wanted, ...]:
        """What is wanted of rows [start, stop), as values; with `drafts`, of each the tokens between the last one and
        its row, the same of their rows as of that token's."""
        wants = []
        for wanted in self.wants:
            part = wanted.within(start, stop)
            if part is None:
                continue
            if isinstance(part.want, _DRAWN):  # each row has a history of its own
                wants += [self._at_row(row, part.want) for row in range(part.start, part.stop)]
            else:
                wants.append(part)
            if drafts and part.stop == len(self.token_ids) and not isinstance(part.want, NextLogprobs):
                wants += [self._at_row(part.stop + i, part.want, path) for i, path in enumerate(drafts)]
        return tuple(wants)

    def _at_row(self, row: int, want: Want, drafts: SequenceOf[int] = ()) -> Wanted:
        """With the history of this row, which is that of the last of the `drafts`, if there are any."""
        if not isinstance(want, _DRAWN):
            return Wanted(row, row + 1, want)
        counts = self.attached(TokenCounts) if self._attached else None
        grammar = self.attached(GrammarState) if self._attached else None
        token_ids: SequenceOf[int] = self.token_ids
        if row != len(token_ids) - 1:
            behind = len(token_ids) - row - 1  # tokens that the row does not see
            token_ids = [*token_ids, *drafts] if drafts else token_ids[: row + 1]
            if counts is not None:
                counts = counts.fork()
                counts.advance(drafts)
                counts.rollback(min(max(behind, 0), counts.num_tokens))  # those before it was attached are the prompt's
            if grammar is not None:
                grammar = grammar.fork()
                grammar.advance(drafts)
                grammar.rollback(min(max(behind, 0), grammar.num_tokens))
        known = None if counts is None else counts.counts
        mask = None if grammar is None else grammar.mask()
        if isinstance(want, TopK):
            draw = want.draw.at(token_ids, known, mask)
            return Wanted(row, row + 1, want if draw is want.draw else TopK(want.k, draw, want.logprobs))
        draws = tuple([draw.at(token_ids, known, mask) for draw in want.draws])
        same = all(map(is_, draws, want.draws))
        return Wanted(row, row + 1, want if same else Sample(draws, want.max_drafts))

    def commit(self, stop: int) -> None:
        """The step that computed positions up to `stop` has returned. Called by the engine alone. Positions past the
        last token are those of verified drafts, which the coordinator appends next."""
        self.num_computed = stop
        if stop >= self.target:
            self.asked = False
            self.wants = ()

    # --- the verbs ---

    def extend(self, token_ids: SequenceOf[int], want: Want | None = None, rows: SequenceOf[Wanted] = ()) -> None:
        """Append tokens; `want` is of the last one's row, `rows` of others. What was wanted before still is."""
        self.token_ids.extend(token_ids)
        for state, _ in self._attached:
            state.advance(token_ids)
        self.asked = True
        last = len(self.token_ids) - 1
        wants = tuple(rows) if want is None else (*rows, Wanted(last, last + 1, want))
        for wanted in wants:
            self._wanted_stop = max(self._wanted_stop, wanted.stop) if self.wants else wanted.stop
            self.wants = (*self.wants, wanted)
            # A row may be wanted again (a fork, or a second question): its KV is recomputed to the same bits.
            self.num_computed = min(self.num_computed, wanted.start)

    def decode(self, draw: Draw) -> None:
        """Draw a token from the last row. The coordinator appends what comes back with `extend`."""
        self.extend((), want=Sample((draw,)))

    def fork(self, at: int, stream: tuple[int, ...]) -> Sequence:
        """A new sequence of the first `at` tokens. Blocks are shared until one of the two writes (copy on write)."""
        if not 0 <= at <= len(self.token_ids):
            raise ValueError(f"fork at {at} of a sequence of {len(self.token_ids)} tokens")
        num_computed = min(self.num_computed, at)
        table = self._kv.fork(self.block_table, num_computed)
        child = Sequence(self._new_id(), self._kv, self._new_id, stream, table)
        child.token_ids = self.token_ids[:at]
        child.num_computed = num_computed
        if self.exact_until is not None and self.exact_until < at:
            child.exact_until = self.exact_until
        for state, since in self._attached:
            if since <= at:
                copy = state.fork()
                copy.rollback(len(self.token_ids) - at)
                child._attached.append((copy, since))
        return child

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens from position `num_tokens` on, their KV and what was wanted of them."""
        if not 0 <= num_tokens <= len(self.token_ids):
            raise ValueError(f"truncate to {num_tokens} of a sequence of {len(self.token_ids)} tokens")
        gone = len(self.token_ids) - num_tokens
        self._attached = [(state, since) for state, since in self._attached if since <= num_tokens]
        for state, _ in self._attached:
            state.rollback(gone)
        del self.token_ids[num_tokens:]
        self.num_computed = min(self.num_computed, num_tokens)
        if self.exact_until is not None and self.exact_until >= num_tokens:
            self.exact_until = None
        self.asked = False
        self.wants = ()
        self._kv.truncate(self.block_table, self.num_computed)

    def drop(self) -> None:
        """End the sequence; its blocks go home. Idempotent."""
        if not self.dropped:
            self.dropped = True
            self._kv.remember_end(self.block_table, self.token_ids)
            self.evict()
            self._attached.clear()

    # --- attached state, and preemption ---

    def attach(self, state: SequenceState) -> None:
        """From now on `state` follows the tokens of this sequence; it has not seen those already here."""
        self._attached.append((state, len(self.token_ids)))

    def detach(self, state: SequenceState) -> None:
        """`state` follows the tokens no longer."""
        self._attached = [(other, since) for other, since in self._attached if other is not state]

    def attached(self, kind: type[State]) -> State | None:
        """The attached state of this type, if there is one."""
        return next((state for state, _ in self._attached if isinstance(state, kind)), None)

    def recompute(self, start: int) -> None:
        """KV of positions from `start` on is given back, and to be computed. Called by the scheduler alone."""
        self.num_computed = start

    def evict(self) -> None:
        """Give the blocks back but stay alive: all KV is to be recomputed. Called by the scheduler alone."""
        self._kv.free(self.block_table)
        self.num_computed = 0
        self.exact_until = None  # of what is computed from here on


class SequenceIds(Protocol):
    """Gives the next unused sequence id."""

    def __call__(self) -> int: ...
