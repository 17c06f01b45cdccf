"""Tiny random models of every family, made by transformers and saved as folders; and transformers as their oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.ops import RopeConfig

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_SIZES = SIZES | {
    "num_hidden_layers": 8,  # the sixth is global
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 8,
    "rms_norm_eps": 1e-6,
}
GEMMA3_LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

# Of four layers the last two see a window; as many heads as in the largest Qwen3 are wider than the hidden state.
QWEN_WINDOW = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

# name -> (model type, settings besides the family's sizes)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped-heads": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama3-rope": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3-linear-rope": ("gemma3_text", {"rope_parameters": GEMMA3_LINEAR_ROPE, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", QWEN_WINDOW),
    "qwen2-one-kv-head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-window": ("qwen3", QWEN_WINDOW | {"head_dim": 12}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}


def make(
    folder: Path, variant: str, *, settings: dict[str, Any] | None = None, dtype: str = "float32", **save: Any
) -> Path:
    """Save a variant, with some settings changed, with random weights, large enough for logits far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = VARIANTS[variant]
    sizes = GEMMA3_SIZES if kind == "gemma3_text" else SIZES
    config = AutoConfig.for_model(kind, **(sizes | own | (settings or {})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            else:  # norms: neither all one nor all alike
                parameter.copy_((0.0 if "gemma3" in kind else 1.0) + torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **save)
    return folder


def oracle(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def exact_oracle(folder: Path, rope: Callable[[str], RopeConfig]) -> Any:
    """transformers' model in float64 throughout.

    By itself transformers computes norms and rotations in float32 whatever the model's type. Norms are replaced by
    their definition. Angles stay float32, as the models were trained, and from there on it is float64; the
    frequencies are compared first, since the last bit of a float32 power differs between libraries.
    """
    import torch

    model = oracle(folder).double()
    gemma = model.config.model_type == "gemma3_text"

    def norm(module: Any) -> Callable[..., Any]:
        eps = module.eps if gemma else module.variance_epsilon
        weight = (1.0 + module.weight.float()).double() if gemma else module.weight
        return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotary(module: Any) -> Callable[..., Any]:
        def forward(x: Any, position_ids: Any, layer_type: str | None = None) -> Any:
            theirs = getattr(module, f"{layer_type}_inv_freq") if layer_type else module.inv_freq
            ours = rope(layer_type or "full_attention").inverse_frequencies()
            np.testing.assert_allclose(theirs.numpy(), ours, rtol=3e-7)
            angles = (position_ids[..., None].float() * torch.from_numpy(ours)).double()
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos(), angles.sin()

        return forward

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = norm(module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = rotary(module)
    return model


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, SIZES["vocab_size"], count)]


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def tensors_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def save_tensors(folder: Path, tensors: dict[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
