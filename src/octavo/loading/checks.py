"""What every ModelConfig must satisfy, whichever file it came from."""

from __future__ import annotations

import math

import numpy as np

from octavo.core.errors import ModelFormatError
from octavo.ops import ModelConfig, RopeScaling

_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 12,
    "max_position": 1 << 30,
}


def check_config(config: ModelConfig, path: object) -> None:
    """Raises ModelFormatError naming the value at fault."""
    for name, most in _LIMITS.items():
        value = getattr(config, name)
        if not 1 <= value <= most:
            raise ModelFormatError(path, name, f"must be between 1 and {most}, not {value}")
    if config.num_heads % config.num_kv_heads:
        raise ModelFormatError(
            path, "num_kv_heads", f"must divide the number of heads ({config.num_heads}), not {config.num_kv_heads}"
        )
    if not (math.isfinite(config.norm_eps) and 0 < config.norm_eps < 1):
        raise ModelFormatError(path, "norm_eps", f"must be between 0 and 1, not {config.norm_eps}")
    for layer in config.layers:
        rope = layer.rope
        if rope.dim % 2 or not 2 <= rope.dim <= config.head_dim:
            raise ModelFormatError(
                path, "rope dimension", f"must be even and at most {config.head_dim}, not {rope.dim}"
            )
        if not (math.isfinite(rope.theta) and rope.theta > 0):
            raise ModelFormatError(path, "rope theta", f"must be more than 0, not {rope.theta}")
        if rope.scaling is not None:
            _check_scaling(rope.scaling, rope.dim, path)
        with np.errstate(all="ignore"):
            if not np.isfinite(rope.inverse_frequencies()).all():
                raise ModelFormatError(path, "rope theta", f"{rope.theta} with its scaling gives no finite frequencies")
        if layer.window is not None and layer.window < 1:
            raise ModelFormatError(path, "sliding window", f"must be at least 1, not {layer.window}")


def _check_scaling(scaling: RopeScaling, dim: int, path: object) -> None:
    factors = scaling.factors
    if scaling.kind == "factors" and (len(factors) != dim // 2 or not all(math.isfinite(f) and f > 0 for f in factors)):
        raise ModelFormatError(path, "rope_freqs.weight", f"must be {dim // 2} numbers of more than 0")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if not all(math.isfinite(value) and value > 0 for value in (scaling.factor, low, high)) or low >= high:
        raise ModelFormatError(
            path,
            "rope scaling",
            "its factors must be more than 0, and low_freq_factor less than high_freq_factor, not "
            f"factor={scaling.factor}, low_freq_factor={low}, high_freq_factor={high}",
        )
