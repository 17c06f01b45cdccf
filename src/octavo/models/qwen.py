"""Qwen 2, 2.5 and their distillations, and Qwen 3, dense (Qwen Team, 2024 and 2025).

Llama's blocks. In Qwen 2 queries, keys and values have biases; in Qwen 3 none has, and queries and keys are normalised
per head. A sliding window, where a model uses one, begins at a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.models.decoder import Decoder
from octavo.models.descriptor import Family
from octavo.models.llama import LlamaModel
from octavo.models.model import WeightLoader
from octavo.models.reading import GGUF_HEAD_NORMS, GGUF_LAYER, gguf_config, hf_config, hf_layers, hf_rope, hf_window
from octavo.ops import LayerConfig, ModelConfig, Ops, RopeConfig
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight

if TYPE_CHECKING:
    from octavo.models.keys import GGUFKeys, HFKeys


class Qwen2Model(LlamaModel):
    def load_qkv(self, load: WeightLoader, at: str, *, bias: bool = True) -> Weight:
        return super().load_qkv(load, at, bias=bias)


@dataclass(frozen=True, slots=True)
class Qwen3Layer:
    attention_norm: Weight
    qkv: Weight
    q_norm: Weight
    k_norm: Weight
    output: Weight
    mlp_norm: Weight
    gate_up: Weight
    down: Weight


class Qwen3Model(Decoder):
    def load_layer(self, load: WeightLoader, at: str) -> Qwen3Layer:
        return Qwen3Layer(
            attention_norm=self.load_norm(load, at + "input_layernorm"),
            qkv=self.load_qkv(load, at),
            q_norm=self.load_head_norm(load, at + "self_attn.q_norm"),
            k_norm=self.load_head_norm(load, at + "self_attn.k_norm"),
            output=self.load_output(load, at),
            mlp_norm=self.load_norm(load, at + "post_attention_layernorm"),
            gate_up=self.load_gate_up(load, at),
            down=self.load_down(load, at),
        )

    def layer(self, ops: Ops, index: int, x: Array, batch: BatchHandle, kv: KVLayer) -> Array:
        w, config = self.layers[index], self.config
        rope, eps = config.layers[index].rope, config.norm_eps
        h = ops.rms_norm(x, w.attention_norm, eps)
        q, k, v = ops.split_heads(ops.linear(h, w.qkv), w.qkv.parts, config.head_dim)  # [T, heads, D] each
        ops.store_kv(ops.rope(ops.rms_norm(k, w.k_norm, eps), batch, rope), v, batch, kv)
        q = ops.rope(ops.rms_norm(q, w.q_norm, eps), batch, rope)
        mixed = ops.attention(q, batch, kv, config.score_scale)  # [T, H * D]
        x = ops.linear(mixed, w.output, residual=x)
        h = ops.rms_norm(x, w.mlp_norm, eps)
        return ops.linear(ops.gated(ops.linear(h, w.gate_up), config.activation), w.down, residual=x)


# What config.json may leave out, with the values of transformers.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _hf_layers(keys: HFKeys, head_dim: int) -> tuple[LayerConfig, ...]:
    window = hf_window(keys) if keys.flag("use_sliding_window", False) else None
    first = keys.integer("max_window_layers")
    return hf_layers(keys, window, lambda index: index >= first, lambda kind: hf_rope(keys, kind, head_dim))


def _gguf_layers(_: GGUFKeys, rope: RopeConfig, count: int) -> tuple[LayerConfig, ...]:
    # Files may name a window, but not from which layer on, nor whether the model uses it; llama.cpp does not.
    return (LayerConfig(rope),) * count


def _gguf_reader(name: str) -> Callable[[GGUFKeys], ModelConfig]:
    return lambda keys: gguf_config(keys, name, _gguf_layers)


QWEN2 = Family(
    name="qwen2",
    model=Qwen2Model,
    # The biases are always there, whatever `attention_bias` says.
    read_hf=lambda keys: hf_config(keys.over(_DEFAULTS), "qwen2", _hf_layers, understood=("attention_bias",)),
    read_gguf=_gguf_reader("qwen2"),
    gguf_layer=GGUF_LAYER,
)
QWEN3 = Family(
    name="qwen3",
    model=Qwen3Model,
    read_hf=lambda keys: hf_config(keys.over({**_DEFAULTS, "head_dim": 128}), "qwen3", _hf_layers),
    read_gguf=_gguf_reader("qwen3"),
    gguf_layer={**GGUF_LAYER, **GGUF_HEAD_NORMS},
)
