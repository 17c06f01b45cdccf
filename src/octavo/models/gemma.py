"""Gemma 3, text (Gemma Team, 2025).

Five of six layers see a sliding window and use a rope base of their own. Queries and keys are normalised per head;
norms stand before and after both halves of a block; the embedding is scaled; the MLP is GELU-gated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.models.decoder import Decoder
from octavo.models.descriptor import Family
from octavo.models.model import WeightLoader
from octavo.models.reading import (
    DEFAULT_ROPE_THETA,
    GGUF_HEAD_NORMS,
    GGUF_LAYER,
    SLIDING,
    gguf_config,
    gguf_window,
    hf_config,
    hf_layers,
    hf_rope_parameters,
    hf_window,
    rope_config,
)
from octavo.ops import Activation, LayerConfig, ModelConfig, Ops, RopeConfig
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight

if TYPE_CHECKING:
    from octavo.models.keys import GGUFKeys, HFKeys


@dataclass(frozen=True, slots=True)
class Gemma3Layer:
    attention_norm: Weight
    qkv: Weight
    q_norm: Weight
    k_norm: Weight
    output: Weight
    post_attention_norm: Weight
    mlp_norm: Weight
    gate_up: Weight
    down: Weight
    post_mlp_norm: Weight


class Gemma3Model(Decoder):
    def load_layer(self, load: WeightLoader, at: str) -> Gemma3Layer:
        return Gemma3Layer(
            attention_norm=self.load_norm(load, at + "input_layernorm"),
            qkv=self.load_qkv(load, at),
            q_norm=self.load_head_norm(load, at + "self_attn.q_norm"),
            k_norm=self.load_head_norm(load, at + "self_attn.k_norm"),
            output=self.load_output(load, at),
            post_attention_norm=self.load_norm(load, at + "post_attention_layernorm"),
            mlp_norm=self.load_norm(load, at + "pre_feedforward_layernorm"),
            gate_up=self.load_gate_up(load, at),
            down=self.load_down(load, at),
            post_mlp_norm=self.load_norm(load, at + "post_feedforward_layernorm"),
        )

    def layer(self, ops: Ops, index: int, x: Array, batch: BatchHandle, kv: KVLayer) -> Array:
        w, config = self.layers[index], self.config
        rope, eps = config.layers[index].rope, config.norm_eps
        h = ops.rms_norm(x, w.attention_norm, eps)
        q, k, v = ops.split_heads(ops.linear(h, w.qkv), w.qkv.parts, config.head_dim)  # [T, heads, D] each
        ops.store_kv(ops.rope(ops.rms_norm(k, w.k_norm, eps), batch, rope), v, batch, kv)
        q = ops.rope(ops.rms_norm(q, w.q_norm, eps), batch, rope)
        mixed = ops.attention(q, batch, kv, config.score_scale)  # [T, H * D]
        x = ops.rms_norm(ops.linear(mixed, w.output), w.post_attention_norm, eps, residual=x)
        h = ops.gated(ops.linear(ops.rms_norm(x, w.mlp_norm, eps), w.gate_up), config.activation)
        return ops.rms_norm(ops.linear(h, w.down), w.post_mlp_norm, eps, residual=x)


# What config.json may leave out, with the values of transformers.
_DEFAULTS: dict[str, Any] = {
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
}
# GGUF files name neither: every sixth layer sees everything, the others rotate with a base of their own.
_WINDOW_PERIOD = 6
_LOCAL_ROPE_THETA = 10_000.0
_27B_LAYERS = 62


def _embedding_scale(hidden_size: int) -> float:
    return float(np.sqrt(np.float32(hidden_size)))


def _read_hf(keys: HFKeys) -> ModelConfig:
    if keys.text("model_type") == "gemma3":  # the text model is inside one for images too
        text = keys.table("text_config")
        keys = (text if text.names else keys).over({"tie_word_embeddings": keys.value("tie_word_embeddings")})
    keys = keys.over(_DEFAULTS)
    config = hf_config(keys, "gemma3", _hf_layers, tied=True, activation=keys.text("hidden_activation"))
    return replace(
        config,
        attention_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        embedding_scale=_embedding_scale(config.hidden_size),
        norm_offset=1.0,
    )


def _hf_layers(keys: HFKeys, head_dim: int) -> tuple[LayerConfig, ...]:
    def slides(index: int) -> bool:
        return (index + 1) % keys.positive("sliding_window_pattern", _WINDOW_PERIOD) != 0

    return hf_layers(keys, hf_window(keys), slides, lambda kind: _hf_rope(keys, kind, head_dim))


def _hf_rope(keys: HFKeys, kind: str, dim: int) -> RopeConfig:
    parameters, scaling = hf_rope_parameters(keys, kind), keys.table("rope_scaling")
    if kind == SLIDING:  # never scaled
        return rope_config(parameters, keys.number("rope_local_base_freq", _LOCAL_ROPE_THETA), dim)
    return rope_config(parameters.under(scaling), keys.number("rope_theta", DEFAULT_ROPE_THETA), dim)


def _read_gguf(keys: GGUFKeys) -> ModelConfig:
    config = gguf_config(keys, "gemma3", _gguf_layers, activation=Activation.GELU_TANH)
    hidden, heads = config.hidden_size, config.num_heads
    # Files of the 27B, the only one whose scale is not 1 / sqrt(head_dim), do not say so.
    is_27b = config.num_layers == _27B_LAYERS and 1 <= heads <= hidden
    return replace(
        config,
        attention_scale=(hidden // heads) ** -0.5 if is_27b else 0.0,
        embedding_scale=_embedding_scale(hidden),
    )


def _gguf_layers(keys: GGUFKeys, rope: RopeConfig, count: int) -> tuple[LayerConfig, ...]:
    theta = keys.number("rope.freq_base_swa", _LOCAL_ROPE_THETA)
    local, everything = LayerConfig(RopeConfig(theta, rope.dim), gguf_window(keys)), LayerConfig(rope)
    period = keys.integer("attention.sliding_window_pattern", _WINDOW_PERIOD)
    if period < 1:
        raise keys.malformed("gemma3.attention.sliding_window_pattern", f"must be at least 1, not {period}")
    return tuple(everything if (i + 1) % period == 0 else local for i in range(count))


GEMMA3 = Family(
    name="gemma3",
    model=Gemma3Model,
    read_hf=_read_hf,
    read_gguf=_read_gguf,
    gguf_layer={
        **GGUF_LAYER,
        **GGUF_HEAD_NORMS,
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    # The text model alone, or, as transformers has written it over time, inside one for images too.
    hf_prefixes=(
        ("model.", ""),
        ("language_model.model.", "language_model."),
        ("model.language_model.", ""),
        ("", ""),
    ),
    others=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)
