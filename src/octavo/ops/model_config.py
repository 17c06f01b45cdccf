"""ModelConfig: the one normalised form in which every family and every file format describes a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"  # the tanh approximation (Hendrycks and Gimpel, 2016)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies were changed for longer contexts; none of these depends on a sequence's length.

    kind "linear": frequencies divided by `factor` (position interpolation, Chen et al., 2023).
    kind "llama3": low frequencies divided by `factor`, high ones kept, a smooth blend between (Llama 3.1).
    kind "factors": frequency i divided by `factors[i]` (as a GGUF file's rope_freqs tensor stores llama3 scaling).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2021) on the halves of the first `dim` elements of each head."""

    theta: float
    dim: int  # even, at most head_dim
    scaling: RopeScaling | None = None

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """float32 [dim / 2]: radians per position, computed in float32 as the models were trained."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        powers: NDArray[np.float32] = np.power(np.float32(self.theta), exponents, dtype=np.float32)
        inv_freq: NDArray[np.float32] = np.reciprocal(powers)
        scaling = self.scaling
        if scaling is None:
            return inv_freq
        if scaling.kind == "linear":
            return inv_freq / np.float32(scaling.factor)
        if scaling.kind == "factors":
            factors: NDArray[np.float32] = np.asarray(scaling.factors, np.float32)
            return np.divide(inv_freq, factors)
        return _llama3(inv_freq, scaling)


def _llama3(inv_freq: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    wavelengths = np.float32(2 * math.pi) / inv_freq
    low = scaling.original_max_position / scaling.low_freq_factor  # wavelengths above are fully scaled
    high = scaling.original_max_position / scaling.high_freq_factor  # wavelengths below are kept
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (np.float32(scaling.original_max_position) / wavelengths - np.float32(scaling.low_freq_factor)) / span
    scaled = inv_freq / np.float32(scaling.factor)
    blended = (1 - blend) * scaled + blend * inv_freq
    result = np.where(wavelengths > low, scaled, inv_freq)
    return np.where((wavelengths >= high) & (wavelengths <= low), blended, result).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    rope: RopeConfig
    window: int | None = None  # a token sees this many positions, itself among them; None: all before it


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str  # family, one of octavo.models.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # tokens of context the model was made for
    norm_eps: float
    activation: Activation
    layers: tuple[LayerConfig, ...]
    tie_embeddings: bool  # the output matrix is the embedding
    attention_scale: float = 0.0  # scores are multiplied by it; 0 is 1 / sqrt(head_dim)
    embedding_scale: float = 1.0
    norm_offset: float = 0.0  # added to norm weights when they are loaded (Gemma's files store weight - 1)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def score_scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5
