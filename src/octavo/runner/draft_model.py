"""A small model that guesses what a large one says next, beside it on the same blocks.

Its K and V are further layers of the blocks: tables, copies, prefix cache and files serve both models. After each step
it reads what it has not read yet of the sequences for which guesses are wanted, and draws on, token by token, with the
parameters and the noise of the request: where both models' distributions agree, so do their draws (Gumbel coupling).
Its guesses come back with the results of the step; the next step verifies them.

What it has read is known by block: the tokens in it, how many of them this model has K and V of, and which block they
came after. All of that is for acceptance only: a guess from wrong K and V is a wrong guess.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from octavo.core.plan import BlockCopy, BlockLoad, Grant, GrantResult, StepPlan, accepted_drafts
from octavo.core.want import Sample, Wanted
from octavo.ops.protocol import Array, KVLayer
from octavo.runner.drafting import READ, ROUND, Asked, after, asked_of
from octavo.runner.model_runner import ModelRunner

_NOTHING = (-1, 0)
_MANY = 32  # tokens read in one go, whose time says what one costs


class DraftModel:
    """`runner` runs the small model, whose sequences have at most `max_model_len` tokens. `max_rows`: most rows of one
    of its batches."""

    def __init__(
        self, runner: ModelRunner, num_blocks: int, block_size: int, max_rows: int, max_model_len: int
    ) -> None:
        self.runner = runner
        self._max_model_len = max_model_len
        self.timings: dict[str, float] = {}
        self._size = block_size
        self._max_rows = max_rows
        self._tokens = np.full((num_blocks, block_size), -1, np.int32)
        self._read = np.zeros(num_blocks, np.int64)  # tokens of a block, from its first on, that this model has read
        self._changes = [0] * num_blocks  # times that a block got other tokens
        self._after = [_NOTHING] * num_blocks  # the block that it was read after, and its number of changes then

    @property
    def layers(self) -> list[KVLayer]:
        return self.runner.layers

    # --- what happens to blocks ---

    def prepare(self, copies: Sequence[BlockCopy], loads: Sequence[BlockLoad]) -> None:
        """See Drafter."""
        for source, target in copies:
            self._tokens[target] = self._tokens[source]
            self._read[target] = self._read[source]
            self._after[target] = self._after[source]
            self._changes[target] += 1
        for load in loads:
            self._tokens[load.block] = load.token_ids or -1
            self._read[load.block] = 0
            self._changes[load.block] += 1

    def note(self, grants: Sequence[Grant], results: Sequence[GrantResult]) -> None:
        """A step of the large model has written these tokens."""
        for grant, result in zip(grants, results, strict=True):
            token_ids = list(grant.token_ids)
            if grant.draft_parents:
                accepted = accepted_drafts(grant, result.rows)
                token_ids[len(token_ids) - grant.num_drafts :] = [grant.drafts[n] for n in accepted]
            self._write(grant.block_table, grant.start, token_ids)

    def _write(self, table: Sequence[int], start: int, token_ids: Sequence[int]) -> None:
        for position, token_id in enumerate(token_ids, start):
            block, offset = table[position // self._size], position % self._size
            if self._tokens[block, offset] != token_id:
                self._tokens[block, offset] = token_id
                self._read[block] = min(self._read[block], offset)
                self._changes[block] += 1

    def _first_unread(self, table: Sequence[int], position: int) -> int:
        """The first position up to this one that this model has not read behind the tokens that stand before it."""
        before = _NOTHING
        for index in range(position // self._size + 1):
            block = table[index]
            if self._after[block] != before:
                return index * self._size
            if self._read[block] < self._size:
                return min(index * self._size + int(self._read[block]), position)
            before = block, self._changes[block]
        return position

    def _note_read(self, table: Sequence[int], stop: int) -> None:
        """Positions up to `stop` are read."""
        before = _NOTHING
        for index in range(-(-stop // self._size)):
            block = table[index]
            self._after[block] = before
            self._read[block] = max(int(self._read[block]), min(stop - index * self._size, self._size))
            before = block, self._changes[block]

    # --- guessing ---

    def guess(self, plan: StepPlan, results: tuple[GrantResult, ...], x: Array) -> tuple[GrantResult, ...]:
        """See Drafter."""
        self.note(plan.grants, results)
        asked = [one for one in asked_of(plan, results) if one.position + one.most <= self._max_model_len]
        found: dict[int, list[int]] = {one.number: [] for one in asked}
        self.timings = {}
        going = self._read_up(plan.step, asked, found)
        for depth in range(1, max((one.most for one in going), default=0)):
            going = [one for one in going if depth < one.most and len(found[one.number]) == depth]
            started = time.perf_counter()
            self._draw(plan.step, going, found)
            self.timings[ROUND] = time.perf_counter() - started
        return tuple(
            result._replace(guess=tuple(found[index])) if found.get(index) else result
            for index, result in enumerate(results)
        )

    def _read_up(self, step: int, asked: list[Asked], found: dict[int, list[int]]) -> list[Asked]:
        """Read all that is unread of each, as far as there is room, and draw the first guess of those that were read to
        their end; these."""
        started, left, going, grants = time.perf_counter(), self._max_rows, [], []
        for one in asked:
            table = one.grant.block_table
            self._write(table, one.position, [one.token_id])
            start = self._first_unread(table, one.position)
            stop = min(one.position + 1, start + left)
            positions = np.arange(start, stop)
            token_ids = self._tokens[np.array(table)[positions // self._size], positions % self._size].tolist()
            if not token_ids or min(token_ids) < 0:
                continue
            is_whole = stop == one.position + 1
            wants = (Wanted(one.position, stop, Sample((one.draw,))),) if is_whole else ()
            grants.append(Grant(one.grant.request_id, one.number, start, stop, tuple(token_ids), table, wants))
            left -= stop - start
            if is_whole:
                going.append(one)
            if not left:
                break
        self._run(step, grants, found)
        if (tokens := self._max_rows - left) >= _MANY:
            self.timings[READ] = (time.perf_counter() - started) / tokens
        return going

    def _draw(self, step: int, going: list[Asked], found: dict[int, list[int]]) -> None:
        """One more guess of each."""
        grants = []
        for one in going:
            guessed = found[one.number]
            position, table = one.position + len(guessed), one.grant.block_table
            self._write(table, position, guessed[-1:])
            draw = one.draw
            for token_id in guessed:
                draw = after(draw, token_id)
            want = Wanted(position, position + 1, Sample((draw,)))
            grants.append(
                Grant(one.grant.request_id, one.number, position, position + 1, (guessed[-1],), table, (want,))
            )
        self._run(step, grants, found)

    def _run(self, step: int, grants: list[Grant], found: dict[int, list[int]]) -> None:
        if not grants:
            return
        results = self.runner.run(StepPlan(step, tuple(grants))).results
        for grant, result in zip(grants, results, strict=True):
            if result.error is None:
                self._note_read(grant.block_table, grant.stop)
                found[grant.sequence_id] += [row.draws[0].token_id for row in result.rows if row.draws]
