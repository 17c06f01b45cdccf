"""The model runner: owns the loop over a model's layers, and answers what the grants want."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import Grant, GrantResult, RowResult, StepPlan, StepResult, accepted_drafts
from octavo.core.protocols import BlockTier
from octavo.core.want import FINAL, Hidden
from octavo.models import Model, layer_states
from octavo.ops import Batch, Ops
from octavo.ops.protocol import Array, KVLayer
from octavo.ops.rows import RowRequest, SamplingError
from octavo.runner.input_batch import hidden_rows, logits_requests, make_batch, moves_of
from octavo.runner.logits import rows_per_slice

if TYPE_CHECKING:
    from octavo.runner.drafting import Drafter

log = logging.getLogger(__name__)

Hiddens = dict[int, Iterator[NDArray[np.floating]]]  # by layer: the wanted rows, in the order of the batch


class ModelRunner:
    """One model on one backend, with its KV."""

    def __init__(
        self, model: Model, ops: Ops, *, num_blocks: int, block_size: int, hidden_size: int, vocab_size: int
    ) -> None:
        self._model = model
        self._ops = ops
        self._block_size = block_size
        self._kv: list[KVLayer] = ops.kv_layers(model.kv_specs, num_blocks, block_size)
        self._blocks: list[KVLayer] = self._kv  # all that lies in a block
        self._drafter: Drafter | None = None
        self._trunk = ops.capture(lambda batch: layer_states(model, ops, batch, self._kv))
        self._head = ops.capture_rows(lambda x: model.head(ops, x), hidden_size)
        self._rows_per_slice = rows_per_slice(vocab_size)

    def run(self, plan: StepPlan) -> StepResult:
        """Copies, then all KV writes and attention layer by layer, then rows. Raises if the step as a whole failed."""
        started = time.perf_counter()
        if plan.copies:
            self._ops.copy_blocks(self._blocks, plan.copies)
        for load in plan.loads:
            self._ops.write_block(self._blocks, load.block, load.kv)
        if self._drafter is not None:
            self._drafter.prepare(plan.copies, plan.loads)
        if not plan.grants:
            return StepResult(())
        batch = make_batch(plan.grants, self._block_size)
        wanted = hidden_rows(plan.grants, batch)
        x, states = self._trunk(self._ops.prepare(batch), self._of_trunk(wanted))
        hidden = self._hidden(wanted, states)
        computed = time.perf_counter()
        results = self._answer(plan.grants, batch, x, hidden)
        self._move_accepted(plan.grants, results)
        ended = time.perf_counter()
        timings = {"model": computed - started, "sample": ended - computed}
        if self._drafter is not None:
            results = self._with_guesses(plan, results, x, self._drafter)
            timings["draft"] = time.perf_counter() - ended
            timings |= self._drafter.timings
        return StepResult(results, timings)

    def draft_with(self, drafter: Drafter) -> None:
        """Have a small model or a head guess; what it keeps lies in the same blocks. Before the first step."""
        self._drafter = drafter
        self._blocks = [*self._kv, *drafter.layers]

    @property
    def layers(self) -> list[KVLayer]:
        """K and V."""
        return self._kv

    def _with_guesses(
        self, plan: StepPlan, results: tuple[GrantResult, ...], x: Array, drafter: Drafter
    ) -> tuple[GrantResult, ...]:
        try:
            return drafter.guess(plan, results, x)
        except Exception:  # a guess that cannot be made is nobody's fault
            log.exception("guessing raised; step %d goes on without", plan.step)
            return results

    def _move_accepted(self, grants: tuple[Grant, ...], results: tuple[GrantResult, ...]) -> None:
        """What came true of draft trees goes where it belongs."""
        moves: list[tuple[int, int]] = []
        for grant, result in zip(grants, results, strict=True):
            if grant.draft_parents and result.error is None:
                moves += moves_of(grant, accepted_drafts(grant, result.rows), self._block_size)
        if moves:
            self._ops.copy_slots(self._kv, moves)

    def read_block(self, block: int) -> bytes:
        """K and V of one block in all layers, as `BlockLoad` takes them."""
        return self._ops.read_block(self._blocks, block)

    def _of_trunk(self, wanted: dict[int, NDArray[np.int32]]) -> dict[int, NDArray[np.int32]]:
        """Rows that the layers are asked for: those after the final norm come from the last."""
        if FINAL not in wanted:
            return wanted
        last = len(self._kv)
        rows = np.union1d(wanted.get(last, wanted[FINAL]), wanted[FINAL])
        return {layer: rows for layer, rows in wanted.items() if layer != FINAL} | {last: rows}

    def _hidden(self, wanted: dict[int, NDArray[np.int32]], states: dict[int, Array]) -> Hiddens:
        if FINAL not in wanted:
            return {layer: iter(self._ops.to_numpy(rows)) for layer, rows in states.items()}
        last = len(self._kv)
        rows = self._of_trunk(wanted)[last]
        found = {layer: self._ops.to_numpy(state) for layer, state in states.items()}
        found[FINAL] = self._ops.to_numpy(self._model.final_norm(self._ops, states[last]))
        of_last = {layer: np.searchsorted(rows, wanted[layer]) for layer in (last, FINAL) if layer in wanted}
        return {layer: iter(found[layer][of_last[layer]] if layer in of_last else found[layer]) for layer in wanted}

    def _answer(self, grants: tuple[Grant, ...], batch: Batch, x: Array, hidden: Hiddens) -> tuple[GrantResult, ...]:
        answers = self._sample(batch, x, logits_requests(grants))
        return tuple(_collect(grant, answers, hidden) for grant in grants)

    def _sample(self, batch: Batch, x: Array, requests: Sequence[RowRequest]) -> Iterator[RowResult | SamplingError]:
        """Logits are made slice by slice, so that memory stays bounded."""
        at = 0
        for first in range(0, len(batch.logits_indices), self._rows_per_slice):
            chosen = batch.logits_indices[first : first + self._rows_per_slice]
            logits = self._head(self._ops.take_rows(x, chosen))
            asked = []
            while at < len(requests) and requests[at].row < first + len(chosen):
                asked.append(requests[at]._replace(row=requests[at].row - first) if first else requests[at])
                at += 1
            yield from self._ops.sample(logits, asked)


def _collect(grant: Grant, answers: Iterator[RowResult | SamplingError], hidden: Hiddens) -> GrantResult:
    """The rows of one grant. All of its answers are taken, also after an error: those behind belong to others."""
    rows: list[RowResult] = []
    error: str | None = None
    for start, stop, want in grant.wants:
        for position in range(start, stop):
            if isinstance(want, Hidden):
                states = {layer: next(hidden[layer]).copy() for layer in dict.fromkeys(want.layers)}
                rows.append(RowResult(position, hidden=tuple(states[layer] for layer in want.layers)))
                continue
            answer = next(answers)
            if isinstance(answer, SamplingError):
                error = error or str(answer)
            else:
                rows.append(answer)
    return GrantResult(error=error) if error is not None else GrantResult(tuple(rows))


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class LocalExecutor:
    """Runs steps in the caller's thread."""

    def __init__(self, runner: ModelRunner, tier: BlockTier | None = None) -> None:
        self._runner: ModelRunner | None = runner
        self._tier = tier  # closed with the executor

    def execute(self, plan: StepPlan) -> _Done:
        if self._runner is None:
            raise RuntimeError("the executor is closed")
        return _Done(self._runner.run(plan))

    def close(self) -> None:
        self._runner = None
        if self._tier is not None:
            self._tier.close()
