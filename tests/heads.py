"""Heads that guess, made at random, for tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.formats import RawTensor, open_weights
from octavo.loading.draft_head import as_q8_0, save_head
from octavo.loading.model_config import model_config
from octavo.loading.weights import model_tensor

Weights = dict[str, NDArray[np.float32]]


def random_head(hidden: int, size: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (rng.normal(0, 1 / np.sqrt(shape[-1]), shape)).astype(np.float32)

    return {
        "state_norm": 1 + normal(hidden) / 4,
        "token_norm": 1 + normal(hidden) / 4,
        "from_state": normal(2 * size, hidden),
        "from_token": normal(2 * size, hidden),
        "down": normal(hidden, size),
    }


def save_random_head(path: Path, model: Path, every: int = 2, size: int = 32) -> Path:
    """For a model, of every so many tokens."""
    vocab_size, hidden = model_matrix(model, "lm_head").shape
    save_head(path, random_head(hidden, size), np.arange(0, vocab_size, every) if every > 1 else None, {})
    return path


def model_matrix(model: Path, name: str) -> NDArray[np.float32]:
    with open_weights(model) as file:
        return model_tensor(model_config(file, model), file, name).dequantize()


class NumpyHead:
    """The formula in NumPy, with the weights as they are kept."""

    def __init__(self, weights: Weights, embedding: NDArray[np.float32], output: NDArray[np.float32]) -> None:
        self.weights = {name: value.astype(np.float16).astype(np.float32) for name, value in weights.items()}
        for name in ("from_state", "from_token", "down"):
            value = self.weights[name]
            self.weights[name] = as_q8_0(Path("x"), raw(name, value)).dequantize()
        self.embedding, self.output = embedding, output

    def next_state(self, state: NDArray[np.float32], token_id: int) -> NDArray[np.float32]:
        w = self.weights
        x = w["from_state"] @ (norm(state) * w["state_norm"])
        x += w["from_token"] @ (norm(self.embedding[token_id]) * w["token_norm"])
        gate, up = np.split(x, 2)
        return state + w["down"] @ (gate / (1 + np.exp(-gate)) * up)

    def logits(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.output @ state


def norm(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.sqrt(np.mean(x * x) + 1e-6)


def raw(name: str, values: NDArray[np.float32]) -> RawTensor:
    from octavo.formats import QuantType

    stored = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4 * values.shape[-1])
    return RawTensor(name, values.shape, QuantType.F32, stored)
