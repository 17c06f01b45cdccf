"""The contracts between a model, who loads its weights and who runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight


class WeightLoader(Protocol):
    """Gives a model its weights by their canonical names (those of transformers, without ``model.`` and ``.weight``).

    The model says the shape of each, and how each linear may be split over ranks: by columns (its outputs) or by rows
    (its inputs). A file that has another shape is refused.
    """

    def embedding(self, name: str, rows: int, width: int) -> Weight:
        """[rows, width]"""
        ...

    def vector(self, name: str, size: int, offset: float = 0.0) -> Weight:
        """[size], `offset` added"""
        ...

    def column_parallel(self, outputs: Mapping[str, int], inputs: int, *, bias: bool = False) -> Weight:
        """One handle for matrices [outputs of each name, inputs] that share their input; `.parts` of it are their
        numbers of outputs. `bias`: each has one, NAME.bias [outputs]."""
        ...

    def row_parallel(self, name: str, outputs: int, inputs: int) -> Weight:
        """[outputs, inputs]"""
        ...


class Model(Protocol):
    """Handles only, no state: the runner owns the loop over `embed`, `layer` and `head`, and the KV."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None: ...

    @property
    def kv_specs(self) -> Sequence[KVSpec]:
        """What each layer keeps of a token, one per layer."""
        ...

    def embed(self, ops: Ops, batch: BatchHandle) -> Array:
        """[T, hidden]"""
        ...

    def layer(self, ops: Ops, index: int, x: Array, batch: BatchHandle, kv: KVLayer) -> Array:
        """[T, hidden] -> [T, hidden]; stores the K and V of the batch's tokens."""
        ...

    def head(self, ops: Ops, x: Array) -> Array:
        """[R, hidden] -> logits [R, vocab]"""
        ...

    def final_norm(self, ops: Ops, x: Array) -> Array:
        """[R, hidden] -> [R, hidden]: what the head does first."""
        ...


def layer_states(model: Model, ops: Ops, batch: BatchHandle, kv_layers: Sequence[KVLayer]) -> Iterator[Array]:
    """All of a model but its head: [T, hidden] after the embedding and after each layer."""
    x = model.embed(ops, batch)
    yield x
    for index, kv in enumerate(kv_layers):
        x = model.layer(ops, index, x, batch, kv)
        yield x
