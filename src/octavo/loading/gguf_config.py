"""ModelConfig from a GGUF file's metadata. Keys are those of the GGUF specification and of llama.cpp's converter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.core.errors import ModelFormatError, UnsupportedModelError, shown
from octavo.formats import GGUFFile
from octavo.ops import Activation, LayerConfig, ModelConfig, RopeConfig, RopeScaling
from octavo.loading.checks import check_config

SUPPORTED = ("gemma3", "llama")

# Gemma 3 files name neither: every sixth layer sees everything, the others rotate with a base of their own.
_GEMMA3_WINDOW_PERIOD = 6
_MAX_INTEGER = 2**31 - 1
_GEMMA3_LOCAL_ROPE_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62


class _Metadata:
    """Typed access to one architecture's keys."""

    def __init__(self, path: object, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.architecture = self._get("general.architecture", str)
        if self.architecture not in SUPPORTED:
            raise UnsupportedModelError(
                f"{path}: general.architecture: {self.architecture!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(key, default)
        if value is None:
            raise ModelFormatError(self.path, key, "is missing")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ModelFormatError(self.path, key, f"must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._metadata

    def integer(self, key: str, default: int | None = None) -> int:
        value = int(self._get(f"{self.architecture}.{key}", int, default))
        if not 0 <= value <= _MAX_INTEGER:
            raise ModelFormatError(
                self.path, f"{self.architecture}.{key}", f"must be between 0 and {_MAX_INTEGER}, not {value}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is not None and not isinstance(value, float):
            raise ModelFormatError(self.path, f"{self.architecture}.{key}", "must be a number")
        return float(self._get(f"{self.architecture}.{key}", float | int, default))  # type: ignore[arg-type]

    def text(self, key: str, default: str) -> str:
        return str(self._get(f"{self.architecture}.{key}", str, default))

    def refuse_if_set(self, key: str) -> None:
        value = self._metadata.get(f"{self.architecture}.{key}")
        if value is not None and not (isinstance(value, int | float) and value == 0):
            raise UnsupportedModelError(f"{self.path}: {self.architecture}.{key}={shown(value)} is not supported")


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Raises ModelFormatError for missing or contradictory metadata, UnsupportedModelError for what is not built."""
    keys = _Metadata(file.path, file.metadata)
    for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv"):
        keys.refuse_if_set(key)
    if "token_embd.weight" not in file.tensors:
        raise ModelFormatError(file.path, "token_embd.weight", "tensor is missing")
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path}: {keys.architecture}.attention.value_length differs from key_length")
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    rope = RopeConfig(
        theta=keys.number("rope.freq_base", 10_000.0), dim=rope_dim, scaling=_rope_scaling(keys, file, rope_dim)
    )
    gemma = keys.architecture == "gemma3"
    config = ModelConfig(
        architecture=keys.architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        activation=Activation.GELU_TANH if gemma else Activation.SILU,
        layers=_layers(keys, rope, gemma),
        tie_embeddings="output.weight" not in file.tensors,
        attention_scale=_attention_scale(keys, hidden_size, num_heads),
        embedding_scale=float(np.sqrt(np.float32(hidden_size))) if gemma else 1.0,
    )
    check_config(config, file.path)
    return config


def _attention_scale(keys: _Metadata, hidden_size: int, num_heads: int) -> float:
    """0 where it is 1 / sqrt(head_dim). Files of Gemma 3 27B, the only one where it is not, do not say so."""
    is_27b = keys.architecture == "gemma3" and keys.integer("block_count") == _GEMMA3_27B_LAYERS
    return (hidden_size // num_heads) ** -0.5 if is_27b and 1 <= num_heads <= hidden_size else 0.0


def _layers(keys: _Metadata, rope: RopeConfig, gemma: bool) -> tuple[LayerConfig, ...]:
    count = keys.integer("block_count")
    if not 1 <= count <= 1024:
        raise ModelFormatError(
            keys.path, f"{keys.architecture}.block_count", f"must be between 1 and 1024, not {count}"
        )
    window = keys.integer("attention.sliding_window", 0) or None
    if not gemma:
        return (LayerConfig(rope, window),) * count
    theta = keys.number("rope.freq_base_swa", _GEMMA3_LOCAL_ROPE_THETA)
    local = LayerConfig(RopeConfig(theta, rope.dim), window)
    everything = LayerConfig(rope)
    period = keys.integer("attention.sliding_window_pattern", _GEMMA3_WINDOW_PERIOD)
    if period < 1:
        raise ModelFormatError(
            keys.path, "gemma3.attention.sliding_window_pattern", f"must be at least 1, not {period}"
        )
    return tuple(everything if (i + 1) % period == 0 else local for i in range(count))


def _rope_scaling(keys: _Metadata, file: GGUFFile, dim: int) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is a linear one, and old files call it ``rope.scale_linear``."""
    kind = keys.text("rope.scaling.type", "linear")
    name = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    factor = keys.number(name, 1.0)
    if kind not in ("none", "linear") or not (math.isfinite(factor) and factor > 0):
        raise UnsupportedModelError(
            f"{keys.path}: {keys.architecture}.rope.scaling.type={kind!r} ({name} {factor}) is not supported; "
            "supported: none, linear, and llama3 by a rope_freqs tensor"
        )
    scale = factor if kind == "linear" else 1.0
    if "rope_freqs.weight" in file.tensors:
        stored = file.tensors["rope_freqs.weight"]
        if stored.size != dim // 2:  # before they are unpacked: they may be many
            raise ModelFormatError(file.path, "rope_freqs.weight", f"must be {dim // 2} numbers, not {stored.size}")
        factors = stored.dequantize().reshape(-1)
        return RopeScaling("factors", factors=tuple(scale * float(factor) for factor in factors))
    return None if scale == 1.0 else RopeScaling("linear", factor=scale)
