"""ModelConfig from a Hugging Face folder's config.json, in the forms that transformers 4 and 5 write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.core.model_folder import read_file
from octavo.ops import Activation, LayerConfig, ModelConfig, RopeConfig, RopeScaling
from octavo.loading.checks import check_config

# model_type -> family
SUPPORTED = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3", "gemma3": "gemma3"}

# What config.json may leave out, with the values of transformers where they are not the same for all.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "sliding_window": 4096,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
_DEFAULT_ROPE_THETA = 10_000.0

_ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}
_MAX_CONFIG_BYTES = 1 << 20
_LARGEST = 1 << 53  # no setting comes near; below it every integer is a float

# Settings that change what a model computes and that no family here implements; anything but these values is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
}


class _Config:
    """Typed access to config.json."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default:
                return default[0]
            raise ModelFormatError(self.path, key, "is missing")
        if (isinstance(value, bool) and kinds is not bool) or not isinstance(value, kinds):
            raise ModelFormatError(self.path, key, f"has the wrong type: {value!r}")
        return value

    def integer(self, key: str, *default: int) -> int:
        return int(self.get(key, int, *default))

    def number(self, key: str, *default: float) -> float:
        """A finite number of more than 0; no setting here may be anything else."""
        value = self.get(key, (int, float), *default)
        if not 0 < value < _LARGEST:  # nor is NaN
            raise ModelFormatError(self.path, key, f"must be a finite number of more than 0, not {value!r}")
        return float(value)

    def positive(self, key: str, *default: int) -> int:
        value = self.integer(key, *default)
        if not 1 <= value < _LARGEST:
            raise ModelFormatError(self.path, key, f"must be at least 1 and less than {_LARGEST}, not {value}")
        return value


def config_from_folder(folder: Path) -> ModelConfig:
    """Raises ModelNotFoundError without a config.json, ModelFormatError or UnsupportedModelError for what it says."""
    config = _read(folder / "config.json")
    family, config = _family(config)
    for key, allowed in _NEUTRAL.items():
        if config.values.get(key) not in allowed:
            raise UnsupportedModelError(f"{config.path}: {key}={config.values[key]!r} is not supported")
    gemma = family == "gemma3"
    num_heads = config.positive("num_attention_heads")
    hidden_size = config.positive("hidden_size")
    activation = config.get("hidden_activation", str) if gemma else config.get("hidden_act", str, "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(f"{config.path}: activation {activation!r} is not supported")
    head_dim = config.positive("head_dim", max(hidden_size // num_heads, 1))
    scalar = config.number("query_pre_attn_scalar") if gemma else float(head_dim)
    result = ModelConfig(
        architecture=family,
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.positive("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position=config.positive("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps"),
        activation=_ACTIVATIONS[activation],
        layers=_layers(config, head_dim, gemma),
        tie_embeddings=bool(config.get("tie_word_embeddings", bool, gemma)),
        attention_scale=scalar**-0.5,
        embedding_scale=float(np.sqrt(np.float32(hidden_size))) if gemma else 1.0,
        norm_offset=1.0 if gemma else 0.0,
    )
    check_config(result, config.path)
    return result


def _read(path: Path) -> _Config:
    data = read_file(path.parent, path.name, _MAX_CONFIG_BYTES)
    if data is None:
        raise ModelNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(path, "file", f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelFormatError(path, "file", "must hold a JSON object")
    return _Config(path, values)


def _family(config: _Config) -> tuple[str, _Config]:
    """The family, and the part of the file that describes the text model."""
    kind = config.get("model_type", str)
    if kind not in SUPPORTED:
        supported = ", ".join(sorted(SUPPORTED))
        raise UnsupportedModelError(f"{config.path}: model_type {kind!r} is not supported; supported: {supported}")
    values = config.values
    if kind == "gemma3":
        text = config.get("text_config", dict, {})
        values = {"tie_word_embeddings": values.get("tie_word_embeddings"), **(text or values)}
        kind = "gemma3_text"
    if kind == "llama":  # transformers' Llama has no window, whatever the file says
        values = {key: value for key, value in values.items() if key not in ("sliding_window", "layer_types")}
    return SUPPORTED[kind], _Config(config.path, {**_DEFAULTS[kind], **values})


def _layers(config: _Config, head_dim: int, gemma: bool) -> tuple[LayerConfig, ...]:
    count = config.integer("num_hidden_layers")
    if not 1 <= count <= 1024:
        raise ModelFormatError(config.path, "num_hidden_layers", f"must be between 1 and 1024, not {count}")
    window = config.positive("sliding_window") if config.values["sliding_window"] is not None else None
    kinds = config.get("layer_types", list, None)
    if kinds is None:
        period = config.positive("sliding_window_pattern", 6)
        full = [window is None or (gemma and (i + 1) % period == 0) for i in range(count)]
        kinds = ["full_attention" if f else "sliding_attention" for f in full]
    if len(kinds) != count or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ModelFormatError(config.path, "layer_types", f"must be {count} times full_attention or sliding_attention")
    by_kind = {
        kind: LayerConfig(_rope(config, kind, head_dim, gemma), window if kind == "sliding_attention" else None)
        for kind in sorted(set(kinds))
    }
    return tuple(by_kind[kind] for kind in kinds)


def _rope(config: _Config, kind: str, head_dim: int, gemma: bool) -> RopeConfig:
    local = gemma and kind == "sliding_attention"
    parameters = config.get("rope_parameters", dict, {})  # transformers 5
    if kind in parameters:  # one per kind of layer
        parameters = _Config(config.path, parameters).get(kind, dict, {})
    scaling = config.get("rope_scaling", dict, {})  # transformers 4; Gemma 3 scales its global layers only
    if scaling and not local:  # where both are given, transformers takes this one
        parameters = {**parameters, **scaling} if gemma else scaling
    rope = _Config(config.path, parameters)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{config.path}: partial_rotary_factor other than 1 is not supported")
    theta = rope.number(
        "rope_theta", config.number("rope_local_base_freq" if local else "rope_theta", _DEFAULT_ROPE_THETA)
    )
    return RopeConfig(theta, head_dim, _scaling(rope, config))


def _scaling(rope: _Config, config: _Config) -> RopeScaling | None:
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        if rope.values.get("factor") not in (None, 1) and not rope.values.keys() & {"rope_type", "type"}:
            raise ModelFormatError(config.path, "factor", "says nothing without a rope_type beside it")
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.positive("original_max_position_embeddings"),
        )
    raise UnsupportedModelError(
        f"{config.path}: rope type {kind!r} is not supported; supported: default, linear, llama3"
    )
