"""A sequence: tokens, a table of KV blocks and attached state; and the verbs that act on it.

Nothing else touches KV. The verbs are called between steps, by coordinators; what they ask for is carried out in the
next steps under the scheduler's budget.

A position's KV is either committed (below `num_computed`) or not computed. The last token stays uncomputed until
something wants its row, so forking and then decoding, a full cache hit and n samples of a prompt are no special cases.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from octavo.core.want import Sample

if TYPE_CHECKING:
    from octavo.core.protocols import SequenceState
    from octavo.core.want import Draw, NextLogprobs, Want


State = TypeVar("State")
BlockTable = Any  # a list of block ids; what else the KV cache manager keeps in it is its own


class BlockTables(Protocol):
    """The part of the KV cache manager that verbs need. A table is a list of block ids, owned by one sequence."""

    def new_table(self) -> BlockTable: ...

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable: ...

    def truncate(self, table: BlockTable, num_tokens: int) -> None: ...

    def free(self, table: BlockTable) -> None: ...

    def remember_end(self, table: BlockTable, token_ids: list[int]) -> None: ...


class Sequence:
    """See the module. Made by `SequenceFactory` calls of the engine, and by `fork`."""

    __slots__ = (
        "_attached",
        "_kv",
        "_new_id",
        "asked",
        "block_table",
        "dropped",
        "each_row",
        "id",
        "num_computed",
        "stream",
        "token_ids",
        "want",
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
        self.asked = False  # a verb has asked for work that is not done yet
        self.want: Want | None = None  # of the last token's row
        self.each_row: NextLogprobs | None = None  # of the rows not yet computed
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
        """Positions below this are to be computed: all, or all but the last when nothing wants its row."""
        if self.want is not None or self.each_row is not None:
            return len(self.token_ids)
        return max(len(self.token_ids) - 1, 0)

    @property
    def num_pending(self) -> int:
        return max(self.target - self.num_computed, 0) if self.asked else 0

    def commit(self, stop: int) -> None:
        """The step that computed positions up to `stop` has returned. Called by the engine alone."""
        self.num_computed = stop
        if stop >= self.target:
            self.asked = False
            self.want = None
            self.each_row = None

    # --- the verbs ---

    def extend(
        self, token_ids: SequenceOf[int], want: Want | None = None, each_row: NextLogprobs | None = None
    ) -> None:
        """Append tokens; `want` is of the last one's row, `each_row` of every row that is computed for them."""
        self.token_ids.extend(token_ids)
        for state, _ in self._attached:
            state.advance(token_ids)
        self.asked = True
        self.want = want
        self.each_row = each_row
        if (want is not None or each_row is not None) and self.num_computed >= len(self.token_ids):
            # The row is wanted again (a fork, or a second question): its KV is recomputed to the same bits.
            self.num_computed = len(self.token_ids) - 1

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
        self.asked = False
        self.want = None
        self.each_row = None
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

    def evict(self) -> None:
        """Give the blocks back but stay alive: all KV is to be recomputed. Called by the scheduler alone."""
        self._kv.free(self.block_table)
        self.num_computed = 0


class SequenceIds(Protocol):
    """Gives the next unused sequence id."""

    def __call__(self) -> int: ...
