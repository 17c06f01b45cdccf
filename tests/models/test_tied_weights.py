"""Output matrices that are tied to the embedding, or said to be, as transformers takes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.core.errors import ModelFormatError
from tests.models.probe import Probe
from tests.models.tiny import make, oracle, save_tensors, tensors_of, tokens
from tests.oracle.compare import Tally
from tests.oracle.oracle import all_logits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def equals_transformers(folder: Path) -> Probe:
    probe = Probe(folder)
    Tally().rows(probe.logits(tokens(20)), all_logits(oracle(folder), tokens(20)))
    return probe


def edited(folder: Path, variant: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    make(folder, variant)
    tensors = tensors_of(folder)
    assert EMBEDDING in tensors and HEAD not in tensors, "saved as tied"
    edit(tensors)
    save_tensors(folder, tensors)
    return folder


@pytest.mark.parametrize("variant", ["llama-tied", "gemma3", "qwen2"])  # the second by its default
def test_another_matrix_is_not_tied(tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, (131, 32)).astype(np.float32)
    folder = edited(tmp_path, variant, lambda t: t.update({HEAD: t[EMBEDDING] + noise}))
    with caplog.at_level(logging.WARNING):
        assert not equals_transformers(folder).config.tie_embeddings
    assert "says that lm_head.weight is tied to model.embed_tokens.weight, but the two differ" in caplog.text


def test_the_same_matrix_is_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = edited(tmp_path, "llama-tied", lambda t: t.update({HEAD: t[EMBEDDING].copy()}))
    assert equals_transformers(folder).config.tie_embeddings
    assert not caplog.records


def test_the_output_matrix_alone_is_both(tmp_path: Path) -> None:
    folder = edited(tmp_path, "llama-tied", lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert equals_transformers(folder).config.tie_embeddings


def with_index(folder: Path, *more: str) -> Path:
    """The folder as one shard with an index that lists `more` tensors."""
    names = dict.fromkeys([*tensors_of(folder), *more], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_an_index_that_lists_a_tied_matrix(tmp_path: Path) -> None:
    equals_transformers(with_index(make(tmp_path, "llama-tied"), HEAD))


def test_an_index_that_lists_what_is_needed_and_not_there(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-grouped-heads")
    tensors = tensors_of(folder)
    del tensors[HEAD]
    save_tensors(folder, tensors)
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight: tensor is missing"):
        Probe(with_index(folder, HEAD))
