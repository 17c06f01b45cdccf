"""Logits of every position of a text, from a model without an engine around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.formats import GGUFFile, open_weights
from octavo.loading.weights import FileWeights
from octavo.models import family, layer_states
from octavo.ops import Batch
from octavo.runner.logits import rows_per_slice

if TYPE_CHECKING:
    from octavo.ops import ModelConfig, Ops

Rows = NDArray[np.float32]
_BLOCK_SIZE = 16


class LoadedModel:
    """The model of a file or folder on a backend. Raises what opening and loading it raises."""

    def __init__(self, path: Path, config: ModelConfig, ops: Ops) -> None:
        with open_weights(path) as file:
            weights = FileWeights(ops, config, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
            self._model = family(config.architecture).model(config, weights)
            weights.finish()
        self._ops = ops
        self._vocab_size = config.vocab_size

    def logits(self, token_ids: Sequence[int]) -> Rows:
        """[len(token_ids), vocab], computed in one step."""
        ops, given = self._ops, _batch(token_ids)
        layers = ops.kv_layers(self._model.kv_specs, given.block_tables.shape[1], _BLOCK_SIZE)
        for x in layer_states(self._model, ops, ops.prepare(given), layers):  # noqa: B007 - the last is wanted
            pass
        rows = np.empty((len(token_ids), self._vocab_size), np.float32)
        step = rows_per_slice(self._vocab_size)
        for first in range(0, len(rows), step):
            chosen = np.arange(first, min(first + step, len(rows)), dtype=np.int32)
            rows[chosen] = ops.to_numpy(self._model.head(ops, ops.take_rows(x, chosen)))
        return rows


def _batch(token_ids: Sequence[int]) -> Batch:
    """One sequence from its beginning, in blocks of its own."""
    count = len(token_ids)
    positions = np.arange(count, dtype=np.int32)
    return Batch(
        input_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_start_loc=np.array([0, count], np.int32),
        block_tables=np.arange(-(-count // _BLOCK_SIZE), dtype=np.int32)[None],
        slot_mapping=positions,
        logits_indices=positions,
        block_size=_BLOCK_SIZE,
    )
