"""The ops a model is written against. A backend gives them meaning.

Arrays, weights, KV layers and prepared batches are opaque handles that only the backend looks into. Shapes: T tokens of
the batch, R rows, H heads, KH KV heads, D head_dim. Activations are float32 (float64 on request, on `reference`). No op
changes its inputs, except `store_kv` and `copy_blocks`, which write KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from octavo.ops.model_config import Activation, ModelConfig, RopeConfig
from octavo.ops.rows import RowRequest, SamplingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.core.plan import RowResult
    from octavo.ops.batch import Batch
    from octavo.ops.packing import Packing

Array = Any  # a backend's array
Weight = Any  # a backend's packed weight; a model reads `.parts` of a linear's, the numbers of outputs of its parts
KVLayer = Any  # a backend's K and V of one layer, all blocks
BatchHandle = Any  # a step's Batch as `prepare` gave it


class Replay(Protocol):
    """What `Ops.capture` makes of a function."""

    def __call__(
        self, batch: BatchHandle, wanted: Mapping[int, NDArray[np.int32]] | None = None
    ) -> tuple[Array, dict[int, Array]]:
        """The last state, and by number of state the rows [R, n] that are wanted of it, in their order."""
        ...


class StoredTensor(Protocol):
    """A tensor as the file has it: an octavo.formats.RawTensor, or what stands in for one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def stored(self) -> NDArray[np.uint8]:
        """[stored rows, bytes_per_row], as the file has them."""
        ...

    @property
    def order(self) -> NDArray[np.intp] | None:
        """Row i of the tensor is the stored row order[i]; None: they are in order."""
        ...

    @property
    def dtype(self) -> Any:
        """`.name` is the format's, such as "Q4_1"."""
        ...

    @property
    def size(self) -> int:
        """Number of values."""
        ...

    def dequantize(self, rows: slice | None = None) -> NDArray[np.float32]:
        """float32, of `shape`, or only some rows; a linear weight is [out_features, in_features]."""
        ...


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of each token."""

    num_kv_heads: int
    head_dim: int
    window: int | None


class Ops(Protocol):
    """One backend."""

    name: str

    @property
    def identity(self) -> str:
        """All of this backend that an answer may depend on: types, instruction set, libraries."""
        ...

    def why_not(self, config: ModelConfig) -> str | None:
        """Why this backend cannot run such a model; None when it can."""
        ...

    # --- for the memory plan, before anything is allocated: bytes ---

    def weight_nbytes(self, tensor: StoredTensor) -> int:
        """What this backend keeps of a tensor."""
        ...

    def kv_nbytes(self, spec: KVSpec, num_tokens: int) -> int:
        """K and V of so many tokens in one layer."""
        ...

    def scratch_nbytes(
        self,
        config: ModelConfig,
        layers: Callable[[BatchHandle], Iterator[Array]],
        num_tokens: int,
        num_rows: int,
        num_seqs: int,
        max_context: int,
    ) -> int:
        """Most that one step allocates besides weights and KV: of `num_tokens` tokens of `num_seqs` sequences, and
        `num_rows` rows of logits.

        `layers`: all of the model but its head, as `capture` takes it, on KV layers that may be without blocks and
        weights that need not be packed yet."""
        ...

    # --- made once, at load time ---

    def linear_weight(self, parts: Sequence[StoredTensor], biases: Sequence[StoredTensor] = ()) -> Weight:
        """Pack matrices [out_i, in] that share their input into one handle; its outputs are the parts' side by side.
        `biases`: [out_i] of each part, or none at all."""
        ...

    def defer_packing(self) -> Packing:
        """What weights from here on are given to, instead of being packed at once."""
        ...

    def embedding_weight(self, tensor: StoredTensor) -> Weight:
        """Pack an embedding [vocab, hidden]. The handle serves `embed`, and `linear` where embeddings are tied."""
        ...

    def vector_weight(self, tensor: StoredTensor, offset: float = 0.0) -> Weight:
        """Pack a norm's weight [n]; `offset` is added in float32."""
        ...

    def kv_layers(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int) -> list[KVLayer]:
        """K and V of `num_blocks` blocks for each layer; nothing is read before it was written."""
        ...

    def capture(self, function: Callable[[BatchHandle], Iterator[Array]]) -> Replay:
        """Run the ops of a function that yields a step's states one after another, [T, n] each: the last one comes
        back, and rows of any that are wanted, which cost nothing where nobody wants some. A backend may record the
        ops once and replay them for each batch. So `function` must call the same ops whatever the batch holds."""
        ...

    def capture_rows(self, function: Callable[..., Array], *columns: int) -> Callable[..., Array]:
        """The same for a function of one or several arrays of rows [R, columns], whatever their number."""
        ...

    # --- once a step ---

    def prepare(self, batch: Batch) -> BatchHandle:
        """Hand over a step's metadata; what comes back serves all of its ops and stays as it was when it was made.
        Raises ValueError if the arrays do not fit each other."""
        ...

    # --- the model's ops ---

    def embed(self, batch: BatchHandle, weight: Weight, scale: float = 1.0) -> Array:
        """[T, hidden]: rows of the embedding, times `scale`."""
        ...

    def rms_norm(self, x: Array, weight: Weight, eps: float, residual: Array | None = None) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, plus `residual` (Zhang and Sennrich, 2019)."""
        ...

    def linear(self, x: Array, weight: Weight, residual: Array | None = None) -> Array:
        """[T, out] = x @ weight^T + bias + residual, added in this order."""
        ...

    def split_heads(self, x: Array, parts: Sequence[int], head_dim: int) -> list[Array]:
        """[T, sum(parts)] -> one [T, part / D, D] per part."""
        ...

    def rope(self, x: Array, batch: BatchHandle, rope: RopeConfig) -> Array:
        """[T, heads, D] rotated to the batch's positions; elements i and i + dim/2 form a pair (Su et al., 2021)."""
        ...

    def store_kv(self, k: Array, v: Array, batch: BatchHandle, kv: KVLayer) -> None:
        """Write [T, KH, D] each to the batch's slots, rounded to the KV type."""
        ...

    def attention(self, q: Array, batch: BatchHandle, kv: KVLayer, scale: float) -> Array:
        """[T, H * D]: causal attention of each row over its own sequence's stored K and V, up to its own position and
        inside the layer's window; query head h reads KV head h // (H / KH) (Ainslie et al., 2023). A node of a draft
        tree sees the positions before the tree, its ancestors and itself."""
        ...

    def gated(self, x: Array, activation: Activation) -> Array:
        """[T, 2n] -> [T, n]: activation(first half) * second half (Shazeer, 2020)."""
        ...

    def take_rows(self, x: Array, rows: NDArray[np.int32]) -> Array:
        """[R, n]: rows of x."""
        ...

    def sample(self, logits: Array, requests: Sequence[RowRequest]) -> list[RowResult | SamplingError]:
        """Answer what is asked of rows of logits [R, vocab], each request by itself: one that cannot be answered gives
        its error. Rows are read as float32 and may be asked several times. What is drawn is a function of the row and
        its request alone; ties go to the lower id. `octavo.sampling.Sampler` says what each want means."""
        ...

    def copy_blocks(self, layers: Sequence[KVLayer], copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in all layers, in order."""
        ...

    def copy_slots(self, layers: Sequence[KVLayer], copies: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of single tokens (source slot, target slot) in all layers, in order."""
        ...

    def read_block(self, layers: Sequence[KVLayer], block: int) -> bytes:
        """K and V of one block in all layers, in a form of the backend's own."""
        ...

    def write_block(self, layers: Sequence[KVLayer], block: int, kv: bytes) -> None:
        """What `read_block` gave, into a block. Raises ValueError if it is not of these layers' size."""
        ...

    def to_numpy(self, x: Array) -> NDArray[np.floating]:
        """The values, on the host."""
        ...

    def from_numpy(self, values: NDArray[np.floating]) -> Array:
        """An array of [R, n] values, which must not change while it is in use."""
        ...
