"""The Llama family: SmolLM2, Llama 2 and 3, Mistral (Touvron et al., 2023; Jiang et al., 2023).

Pre-norm blocks: grouped-query attention with rotary positions, then a SiLU-gated MLP. What differs inside the family
(rope scaling, a sliding window, tied embeddings) is in the ModelConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.models.registry import WeightLoader
from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    attention_norm: Weight
    qkv: Weight
    output: Weight
    mlp_norm: Weight
    gate_up: Weight
    down: Weight


class LlamaModel:
    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.embedding = load.embedding("embed_tokens")
        self.layers = [self._load_layer(load, f"layers.{i}.") for i in range(config.num_layers)]
        self.norm = load.vector("norm", config.norm_offset)
        self.lm_head = self.embedding if config.tie_embeddings else load.column_parallel("lm_head")

    def _load_layer(self, load: WeightLoader, at: str) -> LlamaLayer:
        attention, mlp = at + "self_attn.", at + "mlp."
        return LlamaLayer(
            attention_norm=load.vector(at + "input_layernorm", self.config.norm_offset),
            qkv=load.column_parallel(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            output=load.row_parallel(attention + "o_proj"),
            mlp_norm=load.vector(at + "post_attention_layernorm", self.config.norm_offset),
            gate_up=load.column_parallel(mlp + "gate_proj", mlp + "up_proj"),
            down=load.row_parallel(mlp + "down_proj"),
        )

    @property
    def kv_specs(self) -> Sequence[KVSpec]:
        head_dim = self.config.head_dim
        return [
            KVSpec(weights.qkv.parts[1] // head_dim, head_dim, layer.window, layer.rope)
            for weights, layer in zip(self.layers, self.config.layers, strict=True)
        ]

    def embed(self, ops: Ops, batch: BatchHandle) -> Array:
        return ops.embed(batch, self.embedding, self.config.embedding_scale)

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

    def head(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.rms_norm(x, self.norm, self.config.norm_eps), self.lm_head)
