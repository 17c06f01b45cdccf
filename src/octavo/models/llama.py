"""The Llama family: SmolLM2, Llama 2 and 3, Mistral (Touvron et al., 2023; Jiang et al., 2023).

Pre-norm blocks: grouped-query attention with rotary positions, then a SiLU-gated MLP. What differs inside the family
(rope scaling, a sliding window, tied embeddings) is in the ModelConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.models.decoder import Decoder
from octavo.models.descriptor import Family
from octavo.models.model import WeightLoader
from octavo.models.reading import GGUF_LAYER, gguf_config, gguf_window, hf_config, hf_layers, hf_rope, hf_window
from octavo.ops import LayerConfig, ModelConfig, Ops, RopeConfig
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight

if TYPE_CHECKING:
    from octavo.models.keys import GGUFKeys, HFKeys


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    attention_norm: Weight
    qkv: Weight
    output: Weight
    mlp_norm: Weight
    gate_up: Weight
    down: Weight


class LlamaModel(Decoder):
    def load_layer(self, load: WeightLoader, at: str) -> LlamaLayer:
        return LlamaLayer(
            attention_norm=self.load_norm(load, at + "input_layernorm"),
            qkv=self.load_qkv(load, at),
            output=self.load_output(load, at),
            mlp_norm=self.load_norm(load, at + "post_attention_layernorm"),
            gate_up=self.load_gate_up(load, at),
            down=self.load_down(load, at),
        )

    def layer(self, ops: Ops, index: int, x: Array, batch: BatchHandle, kv: KVLayer) -> Array:
        w, config = self.layers[index], self.config
        rope = config.layers[index].rope
        h = ops.rms_norm(x, w.attention_norm, config.norm_eps)
        q, k, v = ops.split_heads(ops.linear(h, w.qkv), w.qkv.parts, config.head_dim)  # [T, heads, D] each
        ops.store_kv(ops.rope(k, batch, rope), v, batch, kv)
        mixed = ops.attention(ops.rope(q, batch, rope), batch, kv, config.score_scale)  # [T, H * D]
        x = ops.linear(mixed, w.output, residual=x)
        h = ops.rms_norm(x, w.mlp_norm, config.norm_eps)
        return ops.linear(ops.gated(ops.linear(h, w.gate_up), config.activation), w.down, residual=x)


# What config.json may leave out, with the values of transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "sliding_window": 4096,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
    },
}


def _read_hf(keys: HFKeys) -> ModelConfig:
    kind = keys.text("model_type")
    if kind == "llama":  # transformers' Llama has no window, whatever the file says
        keys = keys.without("sliding_window", "layer_types")
    return hf_config(keys.over(_DEFAULTS[kind]), "llama", _hf_layers)


def _hf_layers(keys: HFKeys, head_dim: int) -> tuple[LayerConfig, ...]:
    return hf_layers(keys, hf_window(keys), lambda _: True, lambda kind: hf_rope(keys, kind, head_dim))


def _gguf_layers(keys: GGUFKeys, rope: RopeConfig, count: int) -> tuple[LayerConfig, ...]:
    return (LayerConfig(rope, gguf_window(keys)),) * count


LLAMA = Family(
    name="llama",
    model=LlamaModel,
    read_hf=_read_hf,
    read_gguf=lambda keys: gguf_config(keys, "llama", _gguf_layers),
    gguf_layer=GGUF_LAYER,
    gguf_interleaved_rope=True,
)
