"""Costs of the steps of a run, from the cost table by way of a trace of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo.observe import StepCost
from octavo.ops.cost import Widths

if TYPE_CHECKING:
    from octavo.backends.trace import OpRecord
    from octavo.cli.driver import Step
    from octavo.formats import RawTensor
    from octavo.ops import ModelConfig, Ops

_KV_BYTES = {"float64": 8, "float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A tensor's name, shape, format and sizes: what a trace reads of it, without the mapping behind it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    size: int

    def select_rows(self, _: object) -> _Sizes:
        """Rows in another order are of the same size."""
        return self


def _kv_bytes(kv_dtype: str, head_dim: int) -> float:
    """Of an element: the mean of K's, of which 32 share a scale in int8, and V's, of which a head does."""
    scales = 2 / 32 + 2 / head_dim if kv_dtype == "int8" else 0.0
    return _KV_BYTES[kv_dtype] + scales


class StepCosts:
    """What steps of one model cost on one backend.

    Args:
        path: the model file or folder, for the packed sizes of its weights.
        integer: whether integer codes are multiplied as such (`cpu` with compute_dtype "auto").
        kv_dtype: of stored keys and values.
    """

    def __init__(self, path: Path, model: ModelConfig, *, integer: bool, kv_dtype: str) -> None:
        from octavo.formats import GGUFFile, open_weights

        with open_weights(path) as file:
            self._gguf = isinstance(file, GGUFFile)
            self._tensors = {
                name: _Sizes(name, tensor.shape, tensor.dtype, tensor.nbytes, tensor.size)
                for name, tensor in file.tensors.items()
            }
        self._model = model
        self._integer = integer
        self._integer_attention = kv_dtype == "int8"  # but for softmax, which is little beside its products
        self._widths = Widths(kv=_kv_bytes(kv_dtype, model.head_dim))
        self._known: dict[tuple[Any, int], StepCost] = {}

    def of(self, sequences: tuple[tuple[int, int], ...], logits_rows: int) -> StepCost:
        """One step: per sequence (tokens of context already cached, tokens computed), and rows of logits made."""
        key = (tuple(sorted(sequences)), logits_rows)
        if key not in self._known:
            self._known[key] = self._trace(*key)
        return self._known[key]

    def total(self, steps: Iterable[Step]) -> StepCost:
        counts = Counter((step.sequences, step.logits_rows) for step in steps)
        return sum((self.of(*shape) * count for shape, count in counts.items()), StepCost())

    def _trace(self, sequences: tuple[tuple[int, int], ...], logits_rows: int) -> StepCost:
        return sum((cost for _, cost in self.by_op(sequences, logits_rows)), StepCost())

    def by_op(self, sequences: tuple[tuple[int, int], ...], logits_rows: int) -> list[tuple[OpRecord, StepCost]]:
        """What each op of one step costs, in the order in which they run."""
        from octavo.loading.weights import FileWeights
        from octavo.runner.trace import trace_step

        def weights(ops: Ops) -> FileWeights:
            return FileWeights(ops, self._model, "trace", tensors, self._gguf)

        tensors = cast("Mapping[str, RawTensor]", self._tensors)
        records = trace_step(self._model, sequences, weights=weights, widths=self._widths, logits_rows=logits_rows)
        return [(record, self._split(record)) for record in records]

    def _split(self, record: OpRecord) -> StepCost:
        tensors = [self._tensors[name] for name in record.weights]
        formats = [tensor.dtype.name for tensor in tensors if len(tensor.shape) == 2]  # a bias is float32
        of_codes = record.op == "linear" and all(name.startswith("Q") for name in formats)
        integer = (self._integer and of_codes) or (self._integer_attention and record.op == "attention")
        flops = record.cost.flops
        return StepCost(record.cost.bytes, flops if integer else 0, 0 if integer else flops)
