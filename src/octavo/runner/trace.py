"""One step of a model on shapes alone: its ops with FLOPs and bytes, without weights, numbers or KV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from octavo.backends.trace import OpRecord, TraceOps, TraceWeight
from octavo.models import WeightLoader, family, layer_states
from octavo.ops import Batch, ModelConfig, Ops
from octavo.ops.cost import Widths
from octavo.runner.logits import rows_per_slice


def trace_step(
    config: ModelConfig,
    sequences: Sequence[tuple[int, int]],
    *,
    weights: Callable[[Ops], WeightLoader] | None = None,
    widths: Widths | None = None,
    logits_rows: int | None = None,
) -> list[OpRecord]:
    """The ops of a step in which each sequence has (tokens of context already cached, tokens computed now).

    Args:
        weights: makes the loader, for the sizes that a file has; None: weights of `widths.activation` bytes an element.
        logits_rows: rows whose logits are made; None: one per sequence.
    """
    ops = TraceOps(widths)
    model = family(config.architecture).model(config, _ShapeWeights(ops) if weights is None else weights(ops))
    batch = ops.prepare(_batch(sequences))
    *_, x = layer_states(model, ops, batch, ops.kv_layers(model.kv_specs, 0, 1))
    rows = np.arange(len(sequences) if logits_rows is None else logits_rows, dtype=np.int32)
    at_a_time = rows_per_slice(config.vocab_size)
    for first in range(0, len(rows), at_a_time):
        model.head(ops, ops.take_rows(x, rows[first : first + at_a_time]))
    return ops.records


def _batch(sequences: Sequence[tuple[int, int]]) -> Batch:
    starts = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([new for _, new in sequences], out=starts[1:])
    positions: list[NDArray[np.int32]] = [np.arange(old, old + new, dtype=np.int32) for old, new in sequences]
    total = int(starts[-1])
    empty = np.zeros(total, np.int32)
    return Batch(
        input_ids=empty,
        positions=np.concatenate(positions) if positions else empty,
        query_start_loc=starts,
        block_tables=np.zeros((len(sequences), 0), np.int32),
        slot_mapping=empty,
        logits_indices=starts[1:] - 1,
        block_size=1,
    )


@dataclass(frozen=True, slots=True)
class _ShapeTensor:
    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def dtype(self) -> NoReturn:
        raise TypeError("a trace has shapes and no values")

    @property
    def stored(self) -> NoReturn:
        raise TypeError("a trace has shapes and no values")

    @property
    def order(self) -> NoReturn:
        raise TypeError("a trace has shapes and no values")

    def dequantize(self, rows: slice | None = None) -> NoReturn:
        raise TypeError("a trace has shapes and no values")


class _ShapeWeights:
    """The WeightLoader of a model that exists as a configuration only."""

    def __init__(self, ops: TraceOps) -> None:
        self._ops = ops

    def _tensor(self, name: str, *shape: int) -> _ShapeTensor:
        return _ShapeTensor(name, shape, self._ops.widths.activation)

    def embedding(self, name: str, rows: int, width: int) -> TraceWeight:
        return self._ops.embedding_weight(self._tensor(name, rows, width))

    def vector(self, name: str, size: int, offset: float = 0.0) -> TraceWeight:
        return self._ops.vector_weight(self._tensor(name, size), offset)

    def column_parallel(self, outputs: Mapping[str, int], inputs: int, *, bias: bool = False) -> TraceWeight:
        parts = [self._tensor(name, size, inputs) for name, size in outputs.items()]
        biases = [self._tensor(f"{name}.bias", size) for name, size in outputs.items()] if bias else []
        return self._ops.linear_weight(parts, biases)

    def row_parallel(self, name: str, outputs: int, inputs: int) -> TraceWeight:
        return self._ops.linear_weight([self._tensor(name, outputs, inputs)])
