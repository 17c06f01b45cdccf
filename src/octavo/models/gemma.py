"""Gemma 3, text (Gemma Team, 2025).

Five of six layers see a sliding window and use a rope base of their own. Queries and keys are normalised per head;
norms stand before and after both halves of a block; the embedding is scaled; the MLP is GELU-gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.models.registry import WeightLoader
from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight


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


class Gemma3Model:
    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.embedding = load.embedding("embed_tokens")
        self.layers = [self._load_layer(load, f"layers.{i}.") for i in range(config.num_layers)]
        self.norm = load.vector("norm", config.norm_offset)
        self.lm_head = self.embedding if config.tie_embeddings else load.column_parallel("lm_head")

    def _load_layer(self, load: WeightLoader, at: str) -> Gemma3Layer:
        attention, mlp, offset = at + "self_attn.", at + "mlp.", self.config.norm_offset
        return Gemma3Layer(
            attention_norm=load.vector(at + "input_layernorm", offset),
            qkv=load.column_parallel(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            q_norm=load.vector(attention + "q_norm", offset),
            k_norm=load.vector(attention + "k_norm", offset),
            output=load.row_parallel(attention + "o_proj"),
            post_attention_norm=load.vector(at + "post_attention_layernorm", offset),
            mlp_norm=load.vector(at + "pre_feedforward_layernorm", offset),
            gate_up=load.column_parallel(mlp + "gate_proj", mlp + "up_proj"),
            down=load.row_parallel(mlp + "down_proj"),
            post_mlp_norm=load.vector(at + "post_feedforward_layernorm", offset),
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
        rope, eps = config.layers[index].rope, config.norm_eps
        h = ops.rms_norm(x, w.attention_norm, eps)
        q, k, v = ops.split_heads(ops.linear(h, w.qkv), w.qkv.parts, config.head_dim)  # [T, heads, D] each
        ops.store_kv(ops.rope(ops.rms_norm(k, w.k_norm, eps), batch, rope), v, batch, kv)
        q = ops.rope(ops.rms_norm(q, w.q_norm, eps), batch, rope)
        mixed = ops.attention(q, batch, kv, config.score_scale)  # [T, H * D]
        x = ops.rms_norm(ops.linear(mixed, w.output), w.post_attention_norm, eps, residual=x)
        h = ops.gated(ops.linear(ops.rms_norm(x, w.mlp_norm, eps), w.gate_up), config.activation)
        return ops.rms_norm(ops.linear(h, w.down), w.post_mlp_norm, eps, residual=x)

    def head(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.rms_norm(x, self.norm, self.config.norm_eps), self.lm_head)
