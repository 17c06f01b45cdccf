"""The `reference` backend: NumPy, slow, obvious; the oracle of every other backend's tests.

Weights are dequantised to float32 (or float64) when they are loaded. Exact per request only up to rounding: a matrix
product of NumPy's BLAS may round differently for another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from octavo.backends.eager import run_eagerly
from octavo.backends.registry import backend
from octavo.core.plan import RowResult
from octavo.ops import Activation, Batch, KVSpec, ModelConfig, RopeConfig, StoredTensor
from octavo.ops.packing import Packing
from octavo.ops.protocol import Replay
from octavo.ops.rows import RowRequest, SamplingError
from octavo.sampling import Sampler

if TYPE_CHECKING:
    from octavo.backends.registry import BackendSettings

Floats = NDArray[Any]

_FEW_ROWS = 8  # up to here a product per row reads the matrix faster than BLAS's blocked one


def make(settings: BackendSettings) -> ReferenceOps:
    dtype = "float32" if settings.compute_dtype == "auto" else settings.compute_dtype
    return ReferenceOps(dtype, backend("reference").kv_dtype(settings))


@dataclass(slots=True)
class Linear:
    matrix: Floats  # [out, in]; of a weight that is still to be packed [0, in]
    parts: tuple[int, ...]  # outputs of each matrix it was made of
    bias: Floats | None = None  # [out]


@dataclass(frozen=True, slots=True)
class KVLayer:
    k: Floats  # [num_blocks, block_size, KH, D]
    v: Floats
    window: int | None


class ReferenceOps:
    """See octavo.ops.Ops. `dtype` is that of weights and activations, `kv_dtype` that of stored K and V."""

    name = "reference"

    def __init__(self, dtype: str = "float32", kv_dtype: str = "float32") -> None:
        self.dtype = np.dtype(dtype)
        self.kv_dtype = np.dtype(kv_dtype)
        self._frequencies: dict[RopeConfig, Floats] = {}
        self._deferred: list[Callable[[], None]] | None = None  # what is still to be packed
        self._sampler = Sampler()

    @property
    def identity(self) -> str:
        return f"reference {self.dtype} kv {self.kv_dtype} numpy {np.__version__}"

    def why_not(self, config: ModelConfig) -> str | None:
        return None

    # --- memory ---

    def weight_nbytes(self, tensor: StoredTensor) -> int:
        return tensor.size * self.dtype.itemsize

    def kv_nbytes(self, spec: KVSpec, num_tokens: int) -> int:
        return 2 * num_tokens * spec.num_kv_heads * spec.head_dim * self.kv_dtype.itemsize

    def scratch_nbytes(
        self,
        config: ModelConfig,
        layers: Callable[[Batch], Iterator[Floats]],
        num_tokens: int,
        num_rows: int,
        num_seqs: int,
        max_context: int,
    ) -> int:
        # Widest moment of each part, in arrays alive at once: the gated MLP, one sequence's attention, the logits.
        mlp = num_tokens * (6 * config.intermediate_size + 3 * config.hidden_size)
        keys = 4 * max_context * config.num_kv_heads * config.head_dim
        scores = 3 * config.num_heads * num_tokens * max_context
        logits = 4 * num_rows * config.vocab_size
        return self.dtype.itemsize * max(mlp, keys + scores, logits)

    # --- weights and KV ---

    def linear_weight(self, parts: Sequence[StoredTensor], biases: Sequence[StoredTensor] = ()) -> Linear:
        bias = np.concatenate([one.dequantize() for one in biases]).astype(self.dtype) if biases else None
        weight = Linear(np.empty((0, parts[0].shape[1]), self.dtype), tuple(part.shape[0] for part in parts), bias)

        def pack() -> None:
            matrices = [part.dequantize().astype(self.dtype, copy=False) for part in parts]
            weight.matrix = matrices[0] if len(matrices) == 1 else np.concatenate(matrices)

        if self._deferred is None:
            pack()
        else:
            self._deferred.append(pack)
        return weight

    def defer_packing(self) -> Packing:
        deferred = self._deferred = []

        def pack() -> None:
            self._deferred = None
            for weight in deferred:
                weight()
            deferred.clear()

        return Packing(pack, lambda: None)

    def embedding_weight(self, tensor: StoredTensor) -> Linear:
        return self.linear_weight([tensor])

    def vector_weight(self, tensor: StoredTensor, offset: float = 0.0) -> Floats:
        return (tensor.dequantize() + np.float32(offset)).astype(self.dtype)

    def kv_layers(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int) -> list[KVLayer]:
        layers = []
        for spec in specs:
            shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
            # zeros, not empty: the pages of untouched blocks cost no memory.
            layers.append(KVLayer(np.zeros(shape, self.kv_dtype), np.zeros(shape, self.kv_dtype), spec.window))
        return layers

    def capture(self, function: Callable[[Batch], Iterator[Floats]]) -> Replay:
        return run_eagerly(self, function)

    def capture_rows(self, function: Callable[..., Floats], *columns: int) -> Callable[..., Floats]:
        return function

    def prepare(self, batch: Batch) -> Batch:
        return batch

    # --- ops ---

    def embed(self, batch: Batch, weight: Linear, scale: float = 1.0) -> Floats:
        return weight.matrix[batch.input_ids] * self.dtype.type(scale)

    def rms_norm(self, x: Floats, weight: Floats, eps: float, residual: Floats | None = None) -> Floats:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        y = x / np.sqrt(mean_square + self.dtype.type(eps)) * weight
        return y if residual is None else y + residual

    def linear(self, x: Floats, weight: Linear, residual: Floats | None = None) -> Floats:
        if len(x) <= _FEW_ROWS:
            y = np.empty((len(x), len(weight.matrix)), self.dtype)
            for row, out in zip(x, y, strict=True):
                np.dot(weight.matrix, row, out=out)
        else:
            y = x @ weight.matrix.T
        if weight.bias is not None:
            y += weight.bias
        if residual is not None:
            y += residual
        return y

    def split_heads(self, x: Floats, parts: Sequence[int], head_dim: int) -> list[Floats]:
        ends = np.cumsum(parts)[:-1]
        return [part.reshape(len(x), part.shape[1] // head_dim, head_dim) for part in np.split(x, ends, axis=1)]

    def rope(self, x: Floats, batch: Batch, rope: RopeConfig) -> Floats:
        if rope not in self._frequencies:
            self._frequencies[rope] = rope.inverse_frequencies()
        # Angles in float32, as the models were trained; [T, 1, dim / 2].
        angles = (batch.positions.astype(np.float32)[:, None, None] * self._frequencies[rope]).astype(self.dtype)
        cos, sin = np.cos(angles), np.sin(angles)
        half = rope.dim // 2
        first, second, rest = x[..., :half], x[..., half : rope.dim], x[..., rope.dim :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def store_kv(self, k: Floats, v: Floats, batch: Batch, kv: KVLayer) -> None:
        blocks, offsets = np.divmod(batch.slot_mapping, batch.block_size)
        kv.k[blocks, offsets] = k
        kv.v[blocks, offsets] = v

    def attention(self, q: Floats, batch: Batch, kv: KVLayer, scale: float) -> Floats:
        out = np.empty((len(q), q.shape[1] * q.shape[2]), self.dtype)
        for s in range(batch.num_seqs):
            rows = slice(batch.query_start_loc[s], batch.query_start_loc[s + 1])
            if batch.tree_starts is not None and batch.tree_starts[s] >= 0:
                for row in range(rows.start, rows.stop):
                    out[row] = self._attend_node(q, row, s, batch, kv, scale)
            else:
                out[rows] = self._attend(q[rows], batch.positions[rows], batch.block_tables[s], batch, kv, scale)
        return out

    def _attend(
        self, q: Floats, positions: NDArray[np.int32], table: NDArray[np.int32], batch: Batch, kv: KVLayer, scale: float
    ) -> Floats:
        """One sequence: q [n, H, D] at `positions` [n], ascending -> [n, H * D]."""
        if not len(q):
            return np.empty((0, q.shape[1] * q.shape[2]), self.dtype)
        size = batch.block_size
        first = max(int(positions[0]) - kv.window + 1, 0) if kv.window is not None else 0
        stop = int(positions[-1]) + 1
        skip = first // size  # blocks that no row can see
        blocks = table[skip : -(-stop // size)]
        seen = slice(first - skip * size, stop - skip * size)
        keys = kv.k[blocks].reshape(-1, *kv.k.shape[2:])[seen].astype(self.dtype)  # [L, KH, D]
        values = kv.v[blocks].reshape(-1, *kv.v.shape[2:])[seen].astype(self.dtype)
        key_positions = np.arange(first, stop)
        hidden = key_positions[None, :] > positions[:, None]  # [n, L]
        if kv.window is not None:
            hidden |= key_positions[None, :] <= positions[:, None] - kv.window
        return self._mix(q, keys, values, hidden, scale)

    def _attend_node(self, q: Floats, row: int, s: int, batch: Batch, kv: KVLayer, scale: float) -> Floats:
        """One row of a sequence with a draft tree: positions before the tree, ancestors and itself -> [H * D]."""
        assert batch.tree_starts is not None
        assert batch.tree_parents is not None
        size, position = batch.block_size, int(batch.positions[row])
        before = np.arange(min(int(batch.tree_starts[s]), position + 1))
        path: list[int] = []
        node = row if position >= batch.tree_starts[s] else -1
        while node >= 0:
            path.append(int(batch.slot_mapping[node]))
            node = int(batch.tree_parents[node])
        slots = np.concatenate([batch.block_tables[s][before // size] * size + before % size, path[::-1]]).astype(int)
        if kv.window is not None:
            slots = slots[max(position - kv.window + 1, 0) :]
        keys = kv.k[slots // size, slots % size].astype(self.dtype)
        values = kv.v[slots // size, slots % size].astype(self.dtype)
        return self._mix(q[row : row + 1], keys, values, np.zeros((1, len(slots)), np.bool_), scale)[0]

    def _mix(self, q: Floats, keys: Floats, values: Floats, hidden: NDArray[np.bool_], scale: float) -> Floats:
        """q [n, H, D], keys and values [L, KH, D], hidden [n, L] -> [n, H * D]."""
        n, heads, dim = q.shape
        kv_heads = keys.shape[1]
        grouped = q.reshape(n, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        scores = (grouped @ keys.transpose(1, 2, 0)).reshape(kv_heads, -1, n, len(keys)) * self.dtype.type(scale)
        scores[..., hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores)
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = weights.reshape(kv_heads, -1, len(keys)) @ values.transpose(1, 0, 2)  # [KH, H / KH * n, D]
        return mixed.reshape(heads, n, dim).transpose(1, 0, 2).reshape(n, heads * dim)

    def gated(self, x: Floats, activation: Activation) -> Floats:
        gate, up = np.split(x, 2, axis=1)
        if activation is Activation.SILU:
            with np.errstate(over="ignore"):  # exp(-gate) may be inf: gate / inf is the right 0
                return gate / (1 + np.exp(-gate)) * up
        root = self.dtype.type(np.sqrt(2 / np.pi))
        inner = root * (gate + self.dtype.type(0.044715) * gate * gate * gate)
        return self.dtype.type(0.5) * gate * (1 + np.tanh(inner)) * up

    def take_rows(self, x: Floats, rows: NDArray[np.int32]) -> Floats:
        return x[rows]

    def sample(self, logits: Floats, requests: Sequence[RowRequest]) -> list[RowResult | SamplingError]:
        return self._sampler.sample(np.asarray(logits, np.float32), requests)

    def read_block(self, layers: Sequence[KVLayer], block: int) -> bytes:
        return b"".join(part[block].tobytes() for kv in layers for part in (kv.k, kv.v))

    def write_block(self, layers: Sequence[KVLayer], block: int, kv: bytes) -> None:
        parts = [part[block] for layer in layers for part in (layer.k, layer.v)]
        if len(kv) != sum(part.nbytes for part in parts):
            raise ValueError("write_block: not a block of these layers")
        at = 0
        for part in parts:
            part[...] = np.frombuffer(kv, part.dtype, part.size, at).reshape(part.shape)
            at += part.nbytes

    def copy_blocks(self, layers: Sequence[KVLayer], copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:  # in order: a target may be the source of a later copy
            for layer in layers:
                layer.k[target] = layer.k[source]
                layer.v[target] = layer.v[source]

    def copy_slots(self, layers: Sequence[KVLayer], copies: Sequence[tuple[int, int]]) -> None:
        for layer in layers:
            for part in (layer.k, layer.v):
                flat = part.reshape(-1, *part.shape[2:])
                for source, target in copies:
                    flat[target] = flat[source]

    def to_numpy(self, x: Floats) -> Floats:
        return x

    def from_numpy(self, values: NDArray[np.floating]) -> Floats:
        return values.astype(self.dtype)
