"""What families of decoders have in common. A family's file says what is in a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from octavo.models.model import WeightLoader
from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.ops.protocol import Array, BatchHandle, KVLayer, Weight


class Decoder(ABC):
    """Embedding, layers, a norm, and an output matrix of its own or the embedding; see octavo.models.Model.

    A layer is any value with a handle `qkv` of the three projections.
    """

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = load.embedding("embed_tokens", vocab, hidden)
        self.layers: list[Any] = [self.load_layer(load, f"layers.{i}.") for i in range(config.num_layers)]
        self.norm = load.vector("norm", hidden, config.norm_offset)
        self.lm_head = self.embedding if config.tie_embeddings else load.column_parallel({"lm_head": vocab}, hidden)

    @abstractmethod
    def load_layer(self, load: WeightLoader, at: str) -> Any:
        """The weights of a layer; their canonical names begin with `at`."""

    @abstractmethod
    def layer(self, ops: Ops, index: int, x: Array, batch: BatchHandle, kv: KVLayer) -> Array:
        """[T, hidden] -> [T, hidden]"""

    @property
    def kv_specs(self) -> Sequence[KVSpec]:
        head_dim = self.config.head_dim
        return [
            KVSpec(weights.qkv.parts[1] // head_dim, head_dim, layer.window)
            for weights, layer in zip(self.layers, self.config.layers, strict=True)
        ]

    def embed(self, ops: Ops, batch: BatchHandle) -> Array:
        return ops.embed(batch, self.embedding, self.config.embedding_scale)

    def head(self, ops: Ops, x: Array) -> Array:
        return ops.linear(self.final_norm(ops, x), self.lm_head)

    def final_norm(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self.norm, self.config.norm_eps)

    # --- weights that layers have in common ---

    def load_qkv(self, load: WeightLoader, at: str, *, bias: bool = False) -> Weight:
        c = self.config
        query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = at + "self_attn."
        outputs = {attention + "q_proj": query, attention + "k_proj": key, attention + "v_proj": key}
        return load.column_parallel(outputs, c.hidden_size, bias=bias)

    def load_output(self, load: WeightLoader, at: str) -> Weight:
        c = self.config
        return load.row_parallel(at + "self_attn.o_proj", c.hidden_size, c.num_heads * c.head_dim)

    def load_gate_up(self, load: WeightLoader, at: str) -> Weight:
        outputs = dict.fromkeys((at + "mlp.gate_proj", at + "mlp.up_proj"), self.config.intermediate_size)
        return load.column_parallel(outputs, self.config.hidden_size)

    def load_down(self, load: WeightLoader, at: str) -> Weight:
        return load.row_parallel(at + "mlp.down_proj", self.config.hidden_size, self.config.intermediate_size)

    def load_norm(self, load: WeightLoader, name: str) -> Weight:
        """Of the hidden state."""
        return load.vector(name, self.config.hidden_size, self.config.norm_offset)

    def load_head_norm(self, load: WeightLoader, name: str) -> Weight:
        """Of each head by itself."""
        return load.vector(name, self.config.head_dim, self.config.norm_offset)
