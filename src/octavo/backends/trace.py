"""The `trace` backend: no numbers, only shapes. Running a model on it yields its ops with their FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.backends.eager import run_eagerly
from octavo.core.plan import RowResult
from octavo.ops import Activation, Batch, KVSpec, ModelConfig, RopeConfig, StoredTensor, cost
from octavo.ops.cost import Cost, Widths
from octavo.ops.packing import Packing
from octavo.ops.protocol import Replay
from octavo.ops.rows import RowRequest, SamplingError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceArray:
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TraceWeight:
    names: tuple[str, ...]  # of the tensors it was made of
    shape: Shape  # [out, in] of a matrix, [n] of a vector
    nbytes: int
    parts: tuple[int, ...] = ()
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One op of a step."""

    op: str
    inputs: tuple[Shape, ...]  # shapes of the arrays it reads, weights not among them
    output: Shape  # () for an op that only writes KV
    weights: tuple[str, ...]  # names of the tensors it reads
    cost: Cost


class TraceOps:
    """See octavo.ops.Ops. `records` lists what was run, in order."""

    name = "trace"

    def __init__(self, widths: Widths | None = None) -> None:
        self.widths = widths or Widths()
        self.records: list[OpRecord] = []

    @property
    def identity(self) -> str:
        return "trace"

    def why_not(self, config: ModelConfig) -> str | None:
        return None

    # --- memory and weights: sizes as the file has them ---

    def weight_nbytes(self, tensor: StoredTensor) -> int:
        return tensor.nbytes

    def kv_nbytes(self, spec: KVSpec, num_tokens: int) -> int:
        return round(2 * num_tokens * spec.num_kv_heads * spec.head_dim * self.widths.kv)

    def scratch_nbytes(
        self,
        config: ModelConfig,
        layers: Callable[[Batch], Iterator[TraceArray]],
        num_tokens: int,
        num_rows: int,
        num_seqs: int,
        max_context: int,
    ) -> int:
        return 0

    def linear_weight(self, parts: Sequence[StoredTensor], biases: Sequence[StoredTensor] = ()) -> TraceWeight:
        outputs = tuple(part.shape[0] for part in parts)
        read = [*parts, *biases]
        names = tuple(tensor.name for tensor in read)
        shape = (sum(outputs), parts[0].shape[1])
        return TraceWeight(names, shape, sum(tensor.nbytes for tensor in read), outputs, bool(biases))

    def defer_packing(self) -> Packing:
        return Packing(lambda: None, lambda: None)

    def embedding_weight(self, tensor: StoredTensor) -> TraceWeight:
        return self.linear_weight([tensor])

    def vector_weight(self, tensor: StoredTensor, offset: float = 0.0) -> TraceWeight:
        return TraceWeight((tensor.name,), tensor.shape, tensor.nbytes)

    def kv_layers(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int) -> list[KVSpec]:
        return list(specs)

    def capture(self, function: Callable[[Batch], Iterator[TraceArray]]) -> Replay:
        return run_eagerly(self, function)

    def capture_rows(self, function: Callable[..., TraceArray], *columns: int) -> Callable[..., TraceArray]:
        return function

    def prepare(self, batch: Batch) -> Batch:
        return batch

    # --- ops ---

    def _record(
        self, op: str, inputs: Sequence[TraceArray], output: Shape, weight: TraceWeight | None, spent: Cost
    ) -> TraceArray:
        names = weight.names if weight is not None else ()
        self.records.append(OpRecord(op, tuple(x.shape for x in inputs), output, names, spent))
        return TraceArray(output)

    def embed(self, batch: Batch, weight: TraceWeight, scale: float = 1.0) -> TraceArray:
        rows, hidden = weight.shape
        spent = cost.embed(batch.num_tokens, hidden, weight.nbytes // rows, scale != 1.0, self.widths)
        return self._record("embed", [], (batch.num_tokens, hidden), weight, spent)

    def rms_norm(
        self, x: TraceArray, weight: TraceWeight, eps: float, residual: TraceArray | None = None
    ) -> TraceArray:
        if x.shape[-1] != weight.shape[0]:
            raise ValueError(f"rms_norm: {x.shape} does not end in {weight.shape}")
        spent = cost.rms_norm(x.size, weight.nbytes, residual is not None, self.widths)
        return self._record("rms_norm", _present(x, residual), x.shape, weight, spent)

    def linear(self, x: TraceArray, weight: TraceWeight, residual: TraceArray | None = None) -> TraceArray:
        rows, in_features = x.shape
        if in_features != weight.shape[1]:
            raise ValueError(f"linear: {x.shape} does not fit a weight of {weight.shape}")
        if residual is not None and residual.shape != (rows, weight.shape[0]):
            raise ValueError(f"linear: residual of {residual.shape}, output of {(rows, weight.shape[0])}")
        spent = cost.linear(
            *(rows, in_features, weight.shape[0], weight.nbytes, residual is not None, self.widths),
            has_bias=weight.has_bias,
        )
        return self._record("linear", _present(x, residual), (rows, weight.shape[0]), weight, spent)

    def split_heads(self, x: TraceArray, parts: Sequence[int], head_dim: int) -> list[TraceArray]:
        if sum(parts) != x.shape[1] or any(part % head_dim for part in parts):
            raise ValueError(f"split_heads: {x.shape} is not {tuple(parts)} of heads of {head_dim}")
        return [TraceArray((x.shape[0], part // head_dim, head_dim)) for part in parts]  # a view: it costs nothing

    def rope(self, x: TraceArray, batch: Batch, rope: RopeConfig) -> TraceArray:
        rotated = x.size // x.shape[-1] * rope.dim
        return self._record("rope", [x], x.shape, None, cost.rope(x.size, rotated, self.widths))

    def store_kv(self, k: TraceArray, v: TraceArray, batch: Batch, kv: KVSpec) -> None:
        if k.shape != v.shape or k.shape != (batch.num_tokens, kv.num_kv_heads, kv.head_dim):
            raise ValueError(f"store_kv: K {k.shape} and V {v.shape} do not fit {kv}")
        self._record("store_kv", [k, v], (), None, cost.store_kv(k.size + v.size, self.widths))

    def attention(self, q: TraceArray, batch: Batch, kv: KVSpec, scale: float) -> TraceArray:
        tokens, heads, head_dim = q.shape
        spent = cost.attention(batch, heads, kv.num_kv_heads, head_dim, kv.window, self.widths)
        return self._record("attention", [q], (tokens, heads * head_dim), None, spent)

    def gated(self, x: TraceArray, activation: Activation) -> TraceArray:
        output = (x.shape[0], x.shape[1] // 2)
        return self._record("gated", [x], output, None, cost.gated(math.prod(output), activation, self.widths))

    def take_rows(self, x: TraceArray, rows: NDArray[np.int32]) -> TraceArray:
        output = (len(rows), *x.shape[1:])
        return self._record("take_rows", [x], output, None, cost.take_rows(math.prod(output), self.widths))

    def sample(self, logits: TraceArray, requests: Sequence[RowRequest]) -> list[RowResult | SamplingError]:
        raise TypeError("the trace backend has shapes and no values")

    def from_numpy(self, values: NDArray[np.floating]) -> TraceArray:
        return TraceArray(values.shape)

    def copy_blocks(self, layers: Sequence[KVSpec], copies: Sequence[tuple[int, int]]) -> None:
        raise TypeError("a trace is of one batch and copies no blocks")

    def copy_slots(self, layers: Sequence[KVSpec], copies: Sequence[tuple[int, int]]) -> None:
        raise TypeError("a trace is of one batch and copies no slots")

    def read_block(self, layers: Sequence[KVSpec], block: int) -> bytes:
        raise TypeError("the trace backend has shapes and no values")

    def write_block(self, layers: Sequence[KVSpec], block: int, kv: bytes) -> None:
        raise TypeError("the trace backend has shapes and no values")

    def to_numpy(self, x: TraceArray) -> Any:
        raise TypeError("the trace backend has shapes and no values")


def _present(*arrays: TraceArray | None) -> list[TraceArray]:
    return [array for array in arrays if array is not None]
