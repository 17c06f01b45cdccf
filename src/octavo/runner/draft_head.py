"""A head that guesses on from the model's own last states (octavo.models.draft_head), at the end of a step.

It keeps nothing of a sequence: the row that drew the last token gives all it needs. Each guess is drawn with the
parameters and the noise of the request, from the head's distribution: where that is the model's, so is the draw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import BlockCopy, BlockLoad, GrantResult, StepPlan
from octavo.core.want import Sample
from octavo.models import Model
from octavo.models.draft_head import DraftHead
from octavo.ops import Batch, Ops
from octavo.ops.protocol import Array, KVLayer
from octavo.ops.rows import RowRequest, SamplingError
from octavo.runner.drafting import ROUND, Asked, after, asked_of
from octavo.runner.logits import rows_per_slice

_NEVER = -1e30  # the logit of a token that the head does not know


class HeadDrafter:
    """`token_ids`: those that the head can guess, by the rows of its output; None: all."""

    def __init__(
        self,
        model: Model,
        head: DraftHead,
        ops: Ops,
        *,
        hidden_size: int,
        vocab_size: int,
        token_ids: NDArray[np.int32] | None = None,
    ) -> None:
        self.timings: dict[str, float] = {}
        self._model = model
        self._ops = ops
        self._vocab_size = vocab_size
        self._rows_per_slice = rows_per_slice(vocab_size)
        self._rows: NDArray[np.floating] = np.empty((0, vocab_size), np.float32)
        self._token_ids = token_ids
        self._embed = ops.capture(lambda batch: iter((model.embed(ops, batch),)))
        self._next = ops.capture_rows(lambda s, e: head.next_state(ops, s, e), hidden_size, hidden_size)
        self._logits = ops.capture_rows(lambda s: head.logits(ops, s), hidden_size)
        self._first = ops.capture_rows(lambda x: model.final_norm(ops, x), hidden_size)

    @property
    def layers(self) -> list[KVLayer]:
        return []

    def prepare(self, copies: Sequence[BlockCopy], loads: Sequence[BlockLoad]) -> None:
        """See Drafter: there is nothing to keep."""

    def guess(self, plan: StepPlan, results: tuple[GrantResult, ...], x: Array) -> tuple[GrantResult, ...]:
        """See Drafter."""
        self.timings = {}
        going = asked_of(plan, results)
        if not going:
            return results
        guessed: dict[int, list[tuple[int, float]]] = {one.number: [] for one in going}
        started, rounds = time.perf_counter(), 0
        state = self._first(self._ops.take_rows(x, np.array([one.row for one in going], np.int32)))
        for depth in range(max(one.most for one in going)):
            kept = [n for n, one in enumerate(going) if depth < one.most and len(guessed[one.number]) == depth]
            if not kept:
                break
            if len(kept) < len(going):
                going, state = [going[n] for n in kept], self._ops.take_rows(state, np.array(kept, np.int32))
            state = self._next(state, self._embedded([one.token_id for one in going]))
            going, rounds = self._draw(going, state, guessed), rounds + 1
        self.timings = {ROUND: (time.perf_counter() - started) / rounds}
        return tuple(
            result._replace(guess=tuple(t for t, _ in found), guess_chances=tuple(c for _, c in found))
            if (found := guessed.get(number))
            else result
            for number, result in enumerate(results)
        )

    def _embedded(self, token_ids: Sequence[int]) -> Array:
        """[R, hidden]"""
        count = len(token_ids)
        zeros = np.zeros(count, np.int32)
        tables = np.zeros((count, 1), np.int32)
        batch = Batch(
            np.array(token_ids, np.int32), zeros, np.arange(count + 1, dtype=np.int32), tables, zeros, zeros, 1
        )
        return self._embed(self._ops.prepare(batch))[0]

    def _draw(self, going: list[Asked], state: Array, guessed: dict[int, list[tuple[int, float]]]) -> list[Asked]:
        """One more guess of each; they, as they stand then. Slice by slice, so that memory stays bounded."""
        following: list[Asked] = []
        for first in range(0, len(going), self._rows_per_slice):
            part = going[first : first + self._rows_per_slice]
            rows = self._ops.take_rows(state, np.arange(first, first + len(part), dtype=np.int32))
            known = self._ops.to_numpy(self._logits(rows))
            drawn = self._sample(known, part, guessed)
            for one, token_id, chance in zip(part, drawn, self._chances(known, drawn), strict=True):
                if token_id is None:
                    following.append(one)
                    continue
                guessed[one.number].append((token_id, chance))
                following.append(one._replace(token_id=token_id, draw=after(one.draw, token_id)))
        return following

    def _sample(
        self, known: NDArray[np.floating], asked: list[Asked], guessed: dict[int, list[tuple[int, float]]]
    ) -> list[int | None]:
        requests = [
            RowRequest(row, one.position + len(guessed[one.number]), Sample((one.draw,)))
            for row, one in enumerate(asked)
        ]
        answers = self._ops.sample(self._ops.from_numpy(self._among_all(known)), requests)
        return [None if isinstance(one, SamplingError) else one.draws[0].token_id for one in answers]

    def _among_all(self, known: NDArray[np.floating]) -> NDArray[np.floating]:
        """The same logits, of all tokens: that of one that the head does not know is never the best."""
        if self._token_ids is None:
            return known
        if len(self._rows) < len(known):  # what is not known stays as it is from one time to the next
            self._rows = np.full((len(known), self._vocab_size), _NEVER, known.dtype)
        rows = self._rows[: len(known)]
        rows[:, self._token_ids] = known
        return rows

    def _chances(self, known: NDArray[np.floating], drawn: list[int | None]) -> list[float]:
        """How probable the head holds what was drawn of each row, without what the request's parameters change."""
        token_ids = np.array([-1 if one is None else one for one in drawn])
        columns = token_ids
        if self._token_ids is not None:
            columns = np.minimum(np.searchsorted(self._token_ids, token_ids), len(self._token_ids) - 1)
            token_ids = np.where(
                self._token_ids[columns] == token_ids, token_ids, -1
            )  # others may be all that is allowed
        highest = known.max(-1)
        sums = np.exp(known - highest[:, None]).sum(-1)
        found = np.exp(known[np.arange(len(known)), columns] - highest) / sums
        return [float(one) for one in np.where(token_ids >= 0, found, 0.0)]
