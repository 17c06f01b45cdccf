"""Tiny models as GGUF files, written by the `gguf` package in the way of llama.cpp's converter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from octavo.ops import ModelConfig
from tests.models.tiny import tensors_of

Quant = gguf.GGMLQuantizationType


def permuted(weights: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """q or k of the Llama family for a rotation of neighbouring pairs; llama.cpp's LlamaModel.permute."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weights.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What the converter writes to rope_freqs.weight for Llama 3's rope scaling."""
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def convert(
    folder: Path,
    out: Path,
    config: ModelConfig,
    *,
    quant: Quant = Quant.F32,
    rope_freqs: NDArray[np.float32] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write `folder`'s weights to the GGUF file `out`; matrices in `quant`, vectors in float32.

    `metadata` (key -> integer, float or string) is added to, or put in place of, what the converter would write.
    """
    name = config.architecture
    writer = gguf.GGUFWriter(out, name)
    first = config.layers[0]
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.layers[min(5, config.num_layers - 1)].rope.theta,  # Gemma 3: of the global layers
    }
    if first.window is not None:
        values["attention.sliding_window"] = first.window
    for key, value in (values | (metadata or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{name}.{key}", value)
    arch = gguf.MODEL_ARCH[name.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    for hf_name, stored in tensors_of(folder).items():
        weights = stored
        if name == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
            weights = permuted(weights, config.num_heads if "q_proj" in hf_name else config.num_kv_heads)
        if name == "gemma3" and hf_name.endswith("norm.weight"):
            weights = weights + 1
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if weights.ndim == 1 or quant is Quant.F32:
            writer.add_tensor(gguf_name, np.ascontiguousarray(weights))
        else:
            writer.add_tensor(gguf_name, gguf.quantize(weights, quant), raw_dtype=quant)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
