"""Tiny random models whose end tokens are likely ones, and their logits without an engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.loading.hf_config import config_from_folder
from octavo.ops import Ops
from tests.models.tiny import edit_config, make, oracle

VOCAB = 72  # (1 + 3 end tokens) * width 16, and some
Logits = Callable[[list[int]], NDArray[np.float32]]


def make_model(folder: Path, variant: str, num_ends: int, vocab_size: int = VOCAB) -> Path:
    """A model folder with a tokenizer of one character a token. Its end tokens are those it likes best."""
    make(folder, variant, settings={"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None})
    _save_tokenizer(folder, vocab_size)
    ends = likely_tokens(folder, vocab_size)[:num_ends]
    edit_config(folder, lambda values: values.update(eos_token_id=ends))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def likely_tokens(folder: Path, vocab_size: int) -> list[int]:
    """Tokens by how often greedy answers to random prompts contain them, most often first."""
    import torch

    model, seen = oracle(folder), Counter[int]()
    for seed in range(12):
        given = torch.tensor([prompt(5 + seed, seed, vocab_size)])
        with torch.no_grad():
            output = model.generate(given, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        seen.update(output[0, given.shape[1] :].tolist())
    return [token for token, _ in seen.most_common()]


def prompt(length: int, seed: int, vocab_size: int = VOCAB) -> list[int]:
    return [int(i) for i in np.random.default_rng(1000 + seed).integers(0, vocab_size, length)]


def logits_of(folder: Path, ops: Ops) -> Logits:
    """The last row of logits [vocab] of any tokens on a backend, without an engine; each computed once."""
    from octavo.cli.logits import LoadedModel

    loaded = LoadedModel(folder, config_from_folder(folder), ops)
    known = cache(lambda token_ids: loaded.logits(token_ids)[-1])
    return lambda token_ids: known(tuple(token_ids))


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
