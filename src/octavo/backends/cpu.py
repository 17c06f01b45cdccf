"""The `cpu` backend: C++ kernels (csrc/), exact per request and independent of what else is in the batch.

Ops called by themselves run at once. `capture` records the ops of a function into a graph instead, which then runs with
each batch's metadata in one call: a step of a 30-layer model is some 300 ops, and Python between them would cost a
third of a decode step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo import _C
from octavo.backends.cpu_sampling import sample_rows
from octavo.backends.processors import available_processors
from octavo.backends.registry import BackendRefusedError, backend
from octavo.core.plan import RowResult
from octavo.ops import Activation, Batch, KVSpec, ModelConfig, RopeConfig, StoredTensor
from octavo.ops.packing import Packing
from octavo.ops.protocol import Replay
from octavo.ops.rows import RowRequest, SamplingError

if TYPE_CHECKING:
    from octavo.backends.registry import BackendSettings

FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_PANEL = 16  # outputs that are packed together, and lanes of a vector
_K_GROUP = 32  # values of an int8 K that share a scale; those of V, of a token and KV head, all do
_MAX_HEAD_DIM = 1024
_MAX_GROUP = 64
_PACK_BYTES = 64 << 20  # float32 made of a file's rows at a time, where they are not packed as they are


def make(settings: BackendSettings) -> CpuOps:
    """Raises BackendRefusedError."""
    try:
        return CpuOps(
            settings.instruction_set,
            settings.threads,
            backend("cpu").kv_dtype(settings),
            settings.compute_dtype,
            share_prefixes=settings.cascade_attention,
            pin_threads=settings.pin_threads,
        )
    except ValueError as error:
        raise BackendRefusedError(str(error)) from None


@dataclass(frozen=True, slots=True)
class CpuWeight:
    packed: _C.Weight
    parts: tuple[int, ...]  # outputs of each matrix it was made of


@dataclass(frozen=True, slots=True)
class _Rows:
    """A tensor to be packed into a segment of a weight, from the segment's output `at` on."""

    weight: _C.Weight
    segment: int
    tensor: StoredTensor
    at: int


@dataclass(frozen=True, slots=True)
class CpuKV:
    layer: _C.KVLayer


@dataclass(frozen=True, slots=True)
class CpuArray:
    """Some columns of a float32 matrix [rows, ...]: of `data`, or while recording of a graph's buffer."""

    data: NDArray[np.float32] | None
    buffer: int
    first: int
    columns: int
    heads: int = 0  # not 0: seen as [rows, heads, columns / heads]

    @property
    def view(self) -> tuple[int, int, int]:
        return self.buffer, self.first, self.columns


class _Deferred(NamedTuple):
    """What is still to be packed, and into which weights."""

    rows: list[_Rows]
    weights: list[_C.Weight]


class CpuPackedBytes:
    """See octavo.ops.packing.PackedBytes. They are the same for all instruction sets."""

    def __init__(self, weights: list[_C.Weight], compute_dtype: str) -> None:
        self.identity = f"cpu compute {compute_dtype}"
        self._weights = weights

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights)

    def write(self, fd: int, offset: int, stop: NDArray[np.uint8]) -> int:
        return _C.write_weights(self._weights, fd, offset, stop)

    def read(self, fd: int, offset: int) -> int:
        return _C.read_weights(self._weights, fd, offset)

    def release(self) -> None:
        for weight in self._weights:
            weight.release()


class CpuOps:
    """See octavo.ops.Ops.

    Args:
        instruction_set: one of `_C.instruction_sets()`; None: the best.
        threads: None: the physical cores this process may use.
        kv_dtype: int8, float16 or float32.
        compute_dtype: "auto" multiplies integer weights by int8 activations; "float32" all in float32.
        share_prefixes: read blocks that several sequences of a step share once for all of them. Changes no result.
        pin_threads: keep each worker thread on one processor.
    """

    name = "cpu"

    def __init__(
        self,
        instruction_set: str | None = None,
        threads: int | None = None,
        kv_dtype: str = "int8",
        compute_dtype: str = "auto",
        *,
        share_prefixes: bool = True,
        pin_threads: bool = False,
    ) -> None:
        self.machine = _C.Machine(
            instruction_set or _C.instruction_sets()[0], threads or available_processors(), share_prefixes, pin_threads
        )
        self.kv_dtype = kv_dtype
        self.compute_dtype = compute_dtype
        self._recording: _C.Graph | None = None
        self._deferred: _Deferred | None = None

    @property
    def identity(self) -> str:
        kv = "int8, a scale for V" if self.kv_dtype == "int8" else self.kv_dtype  # how codes lie in a block
        return f"cpu {self.machine.instruction_set} compute {self.compute_dtype} kv {kv}"

    def why_not(self, config: ModelConfig) -> str | None:
        if config.head_dim % _PANEL or config.head_dim > _MAX_HEAD_DIM:
            return f"head_dim must be a multiple of {_PANEL} and at most {_MAX_HEAD_DIM}, not {config.head_dim}"
        if config.num_heads // config.num_kv_heads > _MAX_GROUP:
            group = config.num_heads // config.num_kv_heads
            return f"at most {_MAX_GROUP} query heads may share a KV head, not {group}"
        return None

    # --- memory ---

    def weight_nbytes(self, tensor: StoredTensor) -> int:
        if len(tensor.shape) != 2:
            return 4 * tensor.size
        outputs, inputs = tensor.shape
        return -(-outputs // _PANEL) * _C.panel_bytes(self._format(tensor), inputs)

    def kv_nbytes(self, spec: KVSpec, num_tokens: int) -> int:
        scales = math.ceil(spec.head_dim / _K_GROUP) + 1 if self.kv_dtype == "int8" else 0
        return num_tokens * spec.num_kv_heads * (2 * spec.head_dim * KV_BYTES[self.kv_dtype] + 4 * scales)

    def scratch_nbytes(
        self,
        config: ModelConfig,
        layers: Callable[[_C.Batch], Iterator[CpuArray]],
        num_tokens: int,
        num_rows: int,
        num_seqs: int,
        max_context: int,
    ) -> int:
        graph, states = self._record(layers)
        # The head's rows are taken, normalised, and made logits, of which each thread may process a copy.
        head = num_tokens * states[-1].columns + 2 * num_rows * config.hidden_size
        head += (num_rows + max(num_rows, self.machine.threads)) * config.vocab_size
        return int(graph.scratch_bytes(num_tokens, num_seqs, max_context)) + 4 * head

    # --- weights and KV ---

    def _format(self, tensor: StoredTensor) -> str:
        name = tensor.dtype.name
        if name not in FORMATS or (self.compute_dtype == "float32" and name.startswith("Q")):
            return "F32"
        return name

    def linear_weight(self, parts: Sequence[StoredTensor], biases: Sequence[StoredTensor] = ()) -> CpuWeight:
        formats = [self._format(part) for part in parts]
        # Neighbours of one format are packed as one matrix.
        starts = [i for i, name in enumerate(formats) if i == 0 or name != formats[i - 1]]
        runs = [parts[a:b] for a, b in pairwise([*starts, len(parts)])]
        segments = [(formats[a], sum(part.shape[0] for part in run)) for a, run in zip(starts, runs, strict=True)]
        bias = np.concatenate([one.dequantize() for one in biases]) if biases else None
        packed = _C.Weight(segments, parts[0].shape[1], bias)
        firsts = [[sum(part.shape[0] for part in run[:i]) for i in range(len(run))] for run in runs]
        rows = [
            _Rows(packed, index, part, at)
            for index, (run, ats) in enumerate(zip(runs, firsts, strict=True))
            for part, at in zip(run, ats, strict=True)
        ]
        if self._deferred is None:
            self._pack(rows)
        else:
            self._deferred.rows.extend(rows)
            self._deferred.weights.append(packed)
        return CpuWeight(packed, tuple(part.shape[0] for part in parts))

    def _pack(self, all_rows: Sequence[_Rows]) -> None:
        as_they_are: list[_Rows] = []
        as_floats: list[_Rows] = []
        for rows in all_rows:
            same = self._format(rows.tensor) == rows.tensor.dtype.name
            (as_they_are if same else as_floats).append(rows)
        # In one call, which leaves the interpreter to other threads all the while.
        _C.pack(
            self.machine,
            [(r.weight, r.segment, np.ascontiguousarray(r.tensor.stored), r.tensor.order, r.at) for r in as_they_are],
        )
        for r in as_floats:
            outputs, inputs = r.tensor.shape
            step = max(_PACK_BYTES // (4 * inputs), 1)
            for first in range(0, outputs, step):
                values = r.tensor.dequantize(slice(first, min(first + step, outputs)))
                _C.pack(self.machine, [(r.weight, r.segment, values.view(np.uint8), None, r.at + first)])

    def defer_packing(self) -> Packing:
        deferred = self._deferred = _Deferred([], [])

        def end() -> None:
            if self._deferred is deferred:
                self._deferred = None
            deferred.rows.clear()

        packed = CpuPackedBytes(deferred.weights, self.compute_dtype)
        return Packing(lambda: self._pack(deferred.rows), end, packed)

    def embedding_weight(self, tensor: StoredTensor) -> CpuWeight:
        return self.linear_weight([tensor])

    def vector_weight(self, tensor: StoredTensor, offset: float = 0.0) -> NDArray[np.float32]:
        return tensor.dequantize() + np.float32(offset)

    def kv_layers(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int) -> list[CpuKV]:
        return [
            CpuKV(_C.KVLayer(self.kv_dtype, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, spec.window or 0))
            for spec in specs
        ]

    # --- recording and running ---

    def prepare(self, batch: Batch) -> _C.Batch:
        return _C.Batch(
            batch.input_ids,
            batch.positions,
            batch.query_start_loc,
            batch.block_tables,
            batch.slot_mapping,
            batch.block_size,
            batch.tree_starts,
            batch.tree_parents,
        )

    def capture(self, function: Callable[[_C.Batch], Iterator[CpuArray]]) -> Replay:
        """Record the ops that `function` calls, once; what comes back runs them with another batch."""
        graph, states = self._record(function)
        last = states[-1]

        def replay(
            batch: _C.Batch, wanted: Mapping[int, NDArray[np.int32]] | None = None
        ) -> tuple[CpuArray, dict[int, CpuArray]]:
            data = np.empty((batch.num_tokens, last.columns), np.float32)
            taken: dict[int, CpuArray] = {}
            taps = []
            for number, rows in (wanted or {}).items():
                state, out = states[number], np.empty((len(rows), states[number].columns), np.float32)
                taken[number] = CpuArray(out, -1, 0, state.columns, state.heads)
                taps.append((state.view, rows, out))
            graph.run([last.buffer], [data], batch, batch.num_tokens, taps)
            return CpuArray(data, -1, 0, last.columns), taken

        return replay

    def capture_rows(self, function: Callable[..., CpuArray], *columns: int) -> Callable[..., CpuArray]:
        graph = self._recording = _C.Graph(self.machine)
        try:
            given = [graph.bind(one) for one in columns]
            result = function(*(CpuArray(None, buffer, 0, one) for buffer, one in zip(given, columns, strict=True)))
        finally:
            self._recording = None

        def replay(*arrays: CpuArray) -> CpuArray:
            out = np.empty((len(_data(arrays[0])), result.columns), np.float32)
            graph.run([*given, result.buffer], [*map(_data, arrays), out], None, len(out))
            return CpuArray(out, -1, 0, result.columns)

        return replay

    def _record(self, function: Callable[[_C.Batch], Iterator[CpuArray]]) -> tuple[_C.Graph, list[CpuArray]]:
        graph = self._recording = _C.Graph(self.machine)
        try:
            states = list(function(None))  # type: ignore[arg-type] # ops record what they do with a batch, not its values
        finally:
            self._recording = None
        return graph, states

    def _op(
        self,
        record: Callable[..., int],
        inputs: Sequence[CpuArray | None],
        columns: int,
        batch: _C.Batch | None = None,
        heads: int = 0,
    ) -> CpuArray:
        """Record one op, or run it. `record(graph, *views)` gives its output's buffer."""
        if self._recording is not None:
            views = [None if x is None else x.view for x in inputs]
            return CpuArray(None, record(self._recording, *views), 0, columns, heads)
        graph = _C.Graph(self.machine)
        present = list({id(x): x for x in inputs if x is not None}.values())  # one may stand twice
        rows = batch.num_tokens if batch is not None else len(_data(present[0]))
        ids = {id(x): graph.bind(_data(x).shape[1]) for x in present}
        views = [None if x is None else (ids[id(x)], x.first, x.columns) for x in inputs]
        data = np.empty((rows, columns), np.float32)
        out = record(graph, *views)
        bound = [_data(x) for x in present]
        if columns:
            graph.run([*ids.values(), out], [*bound, data], batch, rows)
        else:
            graph.run(list(ids.values()), bound, batch, rows)
        return CpuArray(data, -1, 0, columns, heads)

    # --- ops ---

    def embed(self, batch: _C.Batch, weight: CpuWeight, scale: float = 1.0) -> CpuArray:
        return self._op(lambda g: g.embed(weight.packed, scale), [], weight.packed.inputs, batch)

    def rms_norm(
        self, x: CpuArray, weight: NDArray[np.float32], eps: float, residual: CpuArray | None = None
    ) -> CpuArray:
        return self._op(lambda g, a, r: g.rms_norm(a, weight, eps, r), [x, residual], x.columns, heads=x.heads)

    def linear(self, x: CpuArray, weight: CpuWeight, residual: CpuArray | None = None) -> CpuArray:
        return self._op(lambda g, a, r: g.linear(a, weight.packed, r), [x, residual], sum(weight.parts))

    def split_heads(self, x: CpuArray, parts: Sequence[int], head_dim: int) -> list[CpuArray]:
        firsts = [x.first + sum(parts[:i]) for i in range(len(parts))]
        return [
            CpuArray(x.data, x.buffer, first, part, part // head_dim) for first, part in zip(firsts, parts, strict=True)
        ]

    def rope(self, x: CpuArray, batch: _C.Batch, rope: RopeConfig) -> CpuArray:
        frequencies = _inverse_frequencies(rope)
        head_dim = x.columns // x.heads
        return self._op(lambda g, a: g.rope(a, head_dim, rope.dim, frequencies), [x], x.columns, batch, x.heads)

    def store_kv(self, k: CpuArray, v: CpuArray, batch: _C.Batch, kv: CpuKV) -> None:
        self._op(lambda g, a, b: g.store_kv(a, b, kv.layer), [k, v], 0, batch)

    def attention(self, q: CpuArray, batch: _C.Batch, kv: CpuKV, scale: float) -> CpuArray:
        return self._op(lambda g, a: g.attention(a, kv.layer, scale), [q], q.columns, batch)

    def gated(self, x: CpuArray, activation: Activation) -> CpuArray:
        return self._op(lambda g, a: g.gated(a, str(activation)), [x], x.columns // 2)

    def take_rows(self, x: CpuArray, rows: NDArray[np.int32]) -> CpuArray:
        return CpuArray(np.ascontiguousarray(self.to_numpy(x)[rows]), -1, 0, x.columns)

    def sample(self, logits: CpuArray, requests: Sequence[RowRequest]) -> list[RowResult | SamplingError]:
        return sample_rows(self.machine, self.to_numpy(logits), requests)

    def copy_blocks(self, layers: Sequence[CpuKV], copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:  # in order: a target may be the source of a later copy
            for kv in layers:
                kv.layer.copy_block(source, target)

    def copy_slots(self, layers: Sequence[CpuKV], copies: Sequence[tuple[int, int]]) -> None:
        for kv in layers:
            for source, target in copies:  # in order, as above
                kv.layer.copy_slot(source, target)

    def read_block(self, layers: Sequence[CpuKV], block: int) -> bytes:
        return b"".join(kv.layer.read_block(block) for kv in layers)

    def write_block(self, layers: Sequence[CpuKV], block: int, kv: bytes) -> None:
        if len(kv) != sum(layer.layer.block_bytes for layer in layers):
            raise ValueError("write_block: not a block of these layers")
        at = 0
        for layer in layers:
            layer.layer.write_block(block, kv[at : at + layer.layer.block_bytes])
            at += layer.layer.block_bytes

    def to_numpy(self, x: CpuArray) -> NDArray[np.float32]:
        data = _data(x)[:, x.first : x.first + x.columns]
        return data.reshape(len(data), x.heads, x.columns // x.heads) if x.heads else data

    def from_numpy(self, values: NDArray[Any]) -> CpuArray:
        """An array of this backend from [rows, n] or [rows, heads, n] values."""
        flat = np.ascontiguousarray(values, np.float32).reshape(len(values), math.prod(values.shape[1:]))
        return CpuArray(flat, -1, 0, flat.shape[1], values.shape[1] if values.ndim == 3 else 0)


@cache  # layers have few different ones, and starting up records them all
def _inverse_frequencies(rope: RopeConfig) -> NDArray[np.float32]:
    return rope.inverse_frequencies()


def _data(x: CpuArray) -> NDArray[np.float32]:
    if x.data is None:
        raise RuntimeError("this array is of a recording and has no values")
    return x.data
