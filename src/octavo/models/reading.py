"""How configurations are read, as far as families agree. What they read differently is in their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from octavo.ops import Activation, LayerConfig, ModelConfig, RopeConfig, RopeScaling

if TYPE_CHECKING:
    from octavo.models.keys import GGUFKeys, HFKeys

MAX_LAYERS = 1024
DEFAULT_ROPE_THETA = 10_000.0
FULL, SLIDING = "full_attention", "sliding_attention"

_ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}

# Settings of config.json that change what a model computes; anything but these values is refused, but by a family that
# has something to do with them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
    "dual_chunk_attention_config": (None,),
}

# GGUF names of what layers have in common, by canonical name.
GGUF_LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_HEAD_NORMS: Mapping[str, str] = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


# --- config.json ---


def hf_config(
    keys: HFKeys,
    architecture: str,
    layers: Callable[[HFKeys, int], tuple[LayerConfig, ...]],
    *,
    tied: bool = False,
    activation: str | None = None,
    understood: tuple[str, ...] = (),
) -> ModelConfig:
    """Sizes and settings by the keys that nearly all families use.

    Args:
        layers: (keys, head_dim) -> one for each layer.
        tied: whether embeddings are tied where the file does not say.
        activation: what the file calls it; None: its `hidden_act`.
        understood: settings that the family itself reads, of those that are otherwise refused.
    """
    for key, allowed in _NEUTRAL.items():
        if key not in understood and keys.value(key) not in allowed:
            raise keys.unsupported(f"{key}={keys.value(key)!r} is not supported")
    num_heads, hidden_size = keys.positive("num_attention_heads"), keys.positive("hidden_size")
    activation = keys.text("hidden_act", "silu") if activation is None else activation
    if activation not in _ACTIVATIONS:
        raise keys.unsupported(f"activation {activation!r} is not supported")
    head_dim = keys.positive("head_dim", max(hidden_size // num_heads, 1))
    return ModelConfig(
        architecture=architecture,
        vocab_size=keys.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=keys.positive("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position=keys.positive("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
        activation=_ACTIVATIONS[activation],
        layers=layers(keys, head_dim),
        tie_embeddings=keys.flag("tie_word_embeddings", tied),
    )


def hf_layers(
    keys: HFKeys, window: int | None, slides: Callable[[int], bool], rope: Callable[[str], RopeConfig]
) -> tuple[LayerConfig, ...]:
    """By `layer_types`; where the file has none, layer i sees `window` only if slides(i). `rope` is that of a kind."""
    count = keys.integer("num_hidden_layers")
    if not 1 <= count <= MAX_LAYERS:
        raise keys.malformed("num_hidden_layers", f"must be between 1 and {MAX_LAYERS}, not {count}")
    kinds = keys.entries("layer_types")
    if kinds is None:
        kinds = [SLIDING if window is not None and slides(i) else FULL for i in range(count)]
    if len(kinds) != count or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise keys.malformed("layer_types", f"must be {count} times full_attention or sliding_attention")
    by_kind = {kind: LayerConfig(rope(kind), window if kind == SLIDING else None) for kind in sorted(set(kinds))}
    return tuple(by_kind[kind] for kind in kinds)


def hf_window(keys: HFKeys) -> int | None:
    return keys.positive("sliding_window") if keys.has("sliding_window") else None


def hf_rope_parameters(keys: HFKeys, kind: str) -> HFKeys:
    """Those of transformers 5, which may be one for each kind of layer."""
    parameters = keys.table("rope_parameters")
    return parameters.table(kind) if kind in parameters.names else parameters


def hf_rope(keys: HFKeys, kind: str, dim: int) -> RopeConfig:
    """Of one base. Where transformers 4's rope_scaling is given too, transformers takes that."""
    parameters, scaling = hf_rope_parameters(keys, kind), keys.table("rope_scaling")
    return rope_config(scaling if scaling.names else parameters, keys.number("rope_theta", DEFAULT_ROPE_THETA), dim)


def rope_config(parameters: HFKeys, theta: float, dim: int) -> RopeConfig:
    """`theta` is for parameters that have none of their own."""
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise parameters.unsupported("partial_rotary_factor other than 1 is not supported")
    return RopeConfig(parameters.number("rope_theta", theta), dim, _hf_scaling(parameters))


def _hf_scaling(rope: HFKeys) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        if rope.value("factor") not in (None, 1) and not {"rope_type", "type"} & set(rope.names):
            raise rope.malformed("factor", "says nothing without a rope_type beside it")
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
    raise rope.unsupported(f"rope type {kind!r} is not supported; supported: default, linear, llama3")


# --- GGUF ---


def gguf_config(
    keys: GGUFKeys,
    architecture: str,
    layers: Callable[[GGUFKeys, RopeConfig, int], tuple[LayerConfig, ...]],
    *,
    activation: Activation = Activation.SILU,
) -> ModelConfig:
    """Sizes and settings by the keys that all architectures use. `layers`: (keys, rope, how many) -> each of them."""
    for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv"):
        keys.refuse_if_set(key)
    embedding = keys.tensor("token_embd.weight")
    if embedding is None:
        raise keys.malformed("token_embd.weight", "tensor is missing")
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.unsupported(f"{keys.architecture}.attention.value_length differs from key_length")
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    theta = keys.number("rope.freq_base", DEFAULT_ROPE_THETA)
    rope = RopeConfig(theta, rope_dim, _gguf_scaling(keys, rope_dim))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        activation=activation,
        layers=(),
        tie_embeddings=keys.tensor("output.weight") is None,
    )
    count = keys.integer("block_count")
    if not 1 <= count <= MAX_LAYERS:
        raise keys.malformed(f"{keys.architecture}.block_count", f"must be between 1 and {MAX_LAYERS}, not {count}")
    return replace(config, layers=layers(keys, rope, count))


def gguf_window(keys: GGUFKeys) -> int | None:
    return keys.integer("attention.sliding_window", 0) or None


def _gguf_scaling(keys: GGUFKeys, dim: int) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is a linear one, and old files call it ``rope.scale_linear``."""
    kind = keys.text("rope.scaling.type", "linear")
    name = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    factor = keys.number(name, 1.0)
    if kind not in ("none", "linear") or not (math.isfinite(factor) and factor > 0):
        raise keys.unsupported(
            f"{keys.architecture}.rope.scaling.type={kind!r} ({name} {factor}) is not supported; "
            "supported: none, linear, and llama3 by a rope_freqs tensor"
        )
    scale = factor if kind == "linear" else 1.0
    stored = keys.tensor("rope_freqs.weight")
    if stored is not None:
        if stored.size != dim // 2:  # before they are unpacked: they may be many
            raise keys.malformed("rope_freqs.weight", f"must be {dim // 2} numbers, not {stored.size}")
        return RopeScaling("factors", factors=tuple(scale * float(f) for f in stored.dequantize().reshape(-1)))
    return None if scale == 1.0 else RopeScaling("linear", factor=scale)
