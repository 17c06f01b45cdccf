"""The ModelConfig of an opened model: what its metadata say, held against its tensors."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from octavo.formats import GGUFFile, RawTensor
from octavo.formats.mapping import ModelFile
from octavo.loading.weights import stored_tensor
from octavo.models import family
from octavo.ops import ModelConfig

log = logging.getLogger(__name__)

_COMPARED_BYTES = 1 << 24  # at a time


def model_config(file: ModelFile, path: Path) -> ModelConfig:
    """Of the file or folder `path`, opened as `file`.

    A model with an output matrix of its own is not tied, whatever config.json says; that is what transformers does.
    Raises ModelNotFoundError, ModelFormatError or UnsupportedModelError.
    """
    if isinstance(file, GGUFFile):  # only the reader that is needed is imported: start-up is short
        from octavo.loading.gguf_config import config_from_gguf

        return config_from_gguf(file)
    from octavo.loading.hf_config import config_from_folder

    config = config_from_folder(path)
    if config.tie_embeddings:
        of_model = family(config.architecture)
        embedding, head = (stored_tensor(of_model, file.tensors, name) for name in ("embed_tokens", "lm_head"))
        if embedding is not None and head is not None and not _same(embedding, head):
            log.warning(
                "%s: config.json says that %s is tied to %s, but the two differ: the output matrix is used as it is",
                path,
                head.name,
                embedding.name,
            )
            return replace(config, tie_embeddings=False)
    return config


def _same(one: RawTensor, other: RawTensor) -> bool:
    """Whether two tensors hold the same, bit for bit."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    rows = max(1, _COMPARED_BYTES // max(1, one.stored.shape[1]))
    parts = range(0, len(one.stored), rows)
    return all(np.array_equal(one.stored[i : i + rows], other.stored[i : i + rows]) for i in parts)
