"""The model runner: owns the loop over a model's layers, and answers what the grants want."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import Grant, GrantResult, StepPlan, StepResult, TokenLogprobs
from octavo.core.protocols import BlockTier
from octavo.core.want import Hidden
from octavo.models import Model, run_layers
from octavo.ops import Batch, Ops
from octavo.ops.protocol import Array, KVLayer
from octavo.runner.input_batch import make_batch, rows_with_next
from octavo.runner.logits import rows_per_slice
from octavo.sampling import Sampler
from octavo.sampling.sampler import SamplingError


class ModelRunner:
    """One model on one backend, with its KV."""

    def __init__(
        self, model: Model, ops: Ops, *, num_blocks: int, block_size: int, num_layers: int, vocab_size: int
    ) -> None:
        self._model = model
        self._ops = ops
        self._block_size = block_size
        self._num_layers = num_layers
        self._kv: list[KVLayer] = ops.kv_layers(model.kv_specs, num_blocks, block_size)
        self._trunk = ops.capture(lambda batch: run_layers(model, ops, batch, self._kv))
        self._sampler = Sampler(ops.rows)
        self._rows_per_slice = rows_per_slice(vocab_size)

    def run(self, plan: StepPlan) -> StepResult:
        """Copies, then all KV writes and attention layer by layer, then rows. Raises if the step as a whole failed."""
        started = time.perf_counter()
        if plan.copies:
            self._ops.copy_blocks(self._kv, plan.copies)
        for load in plan.loads:
            self._ops.write_block(self._kv, load.block, load.kv)
        if not plan.grants:
            return StepResult(())
        batch = make_batch(plan.grants, self._block_size)
        x, hidden = self._forward(batch, plan.grants)
        computed = time.perf_counter()
        results = self._answer(plan.grants, batch, x, hidden)
        ended = time.perf_counter()
        return StepResult(results, {"model": computed - started, "sample": ended - computed})

    def read_block(self, block: int) -> bytes:
        """K and V of one block in all layers, as `BlockLoad` takes them."""
        return self._ops.read_block(self._kv, block)

    def _forward(self, batch: Batch, grants: tuple[Grant, ...]) -> tuple[Array, dict[int, NDArray[np.floating]]]:
        """[T, hidden] after the last layer, and for each layer somebody wants to see, its rows of all grants' ends."""
        wanted = {layer for grant in grants if isinstance(grant.want, Hidden) for layer in grant.want.layers}
        ends = batch.query_start_loc[1:] - 1
        hidden: dict[int, NDArray[np.floating]] = {}
        if not wanted:
            return self._trunk(batch), hidden
        x = self._model.embed(self._ops, batch)
        for index in range(self._num_layers + 1):
            if index in wanted:
                hidden[index] = self._ops.to_numpy(self._ops.take_rows(x, ends))
            if index < self._num_layers:
                x = self._model.layer(self._ops, index, x, batch, self._kv[index])
        return x, hidden

    def _answer(
        self, grants: tuple[Grant, ...], batch: Batch, x: Array, hidden: dict[int, NDArray[np.floating]]
    ) -> tuple[GrantResult, ...]:
        rows = self._logits_rows(batch, x)
        results = []
        for index, grant in enumerate(grants):
            if isinstance(grant.want, Hidden):
                next_logprobs, error = self._next_logprobs(grant, rows)
                states = tuple(hidden[layer][index].copy() for layer in grant.want.layers)
                results.append(GrantResult(hidden=states, next_logprobs=next_logprobs, error=error))
            else:
                results.append(self._answer_one(grant, rows))
        return tuple(results)

    def _logits_rows(self, batch: Batch, x: Array) -> Iterator[NDArray[np.float32]]:
        """Logits of the wanted rows one by one, made slice by slice so that memory stays bounded."""
        for first in range(0, len(batch.logits_indices), self._rows_per_slice):
            chosen = batch.logits_indices[first : first + self._rows_per_slice]
            logits = self._model.head(self._ops, self._ops.take_rows(x, chosen))
            yield from np.asarray(self._ops.to_numpy(logits), np.float32)

    def _next_logprobs(
        self, grant: Grant, rows: Iterator[NDArray[np.float32]]
    ) -> tuple[tuple[TokenLogprobs, ...], str | None]:
        if grant.each_row is None:
            return (), None
        entries: list[TokenLogprobs] = []
        error = None
        for row in rows_with_next(grant):
            logits = next(rows)  # taken even after an error: the rows behind belong to others
            try:
                token_id = grant.token_ids[grant.start + row + 1]
                entries.append(self._sampler.logprobs(logits, token_id, grant.each_row.top))
            except SamplingError as failure:
                error = str(failure)
        return tuple(entries), error

    def _answer_one(self, grant: Grant, rows: Iterator[NDArray[np.float32]]) -> GrantResult:
        next_logprobs, error = self._next_logprobs(grant, rows)
        if grant.want is None or isinstance(grant.want, Hidden):
            return GrantResult(next_logprobs=next_logprobs, error=error)
        logits = next(rows)
        if error is not None:
            return GrantResult(error=error)
        try:
            result = self._sampler.run(logits, grant.want, grant.token_ids, grant.stop - 1)
        except SamplingError as failure:
            return GrantResult(error=str(failure))
        return replace(result, next_logprobs=next_logprobs)


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
