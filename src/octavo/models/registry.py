"""The contract between a model and the runner, and the families there are."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight


class WeightLoader(Protocol):
    """Gives a model its weights by their canonical names (those of transformers, without ``model.`` and ``.weight``).

    A model says how each linear may be split over ranks: by columns (its outputs) or by rows (its inputs).
    """

    def embedding(self, name: str) -> Weight: ...

    def vector(self, name: str, offset: float = 0.0) -> Weight: ...

    def column_parallel(self, *names: str) -> Weight:
        """One handle for matrices that share their input; `.parts` of it are their numbers of outputs."""
        ...

    def row_parallel(self, name: str) -> Weight: ...


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


FAMILIES: dict[str, str] = {
    "llama": "octavo.models.llama:LlamaModel",
    "gemma3": "octavo.models.gemma:Gemma3Model",
}


def model_class(architecture: str) -> type[Model]:
    """The class of a family; `architecture` is a key of FAMILIES."""
    module, name = FAMILIES[architecture].split(":")
    cls: type[Model] = getattr(importlib.import_module(module), name)
    return cls
