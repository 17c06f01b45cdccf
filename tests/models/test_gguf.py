"""A model in a GGUF file answers as it does in the folder it was converted from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.models.families import by_gguf_architecture
from tests.models.gguf_files import Quant, convert, llama3_factors
from tests.models.probe import Probe
from tests.models.tiny import LLAMA3_ROPE, make, save_tensors, tensors_of, tokens
from tests.oracle.compare import Tally

Tiny = Callable[[str], Path]


def same(a: Path, b: Path, tolerance: float = 1e-6) -> None:
    Tally().rows(Probe(a).logits(tokens(96)), Probe(b).logits(tokens(96)), tolerance)


@pytest.mark.parametrize("variant", ["llama-grouped-heads", "llama-tied", "llama-head-dim", "mistral-window"])
def test_llama(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    """Guards against rows of q and k left in llama.cpp's order, and metadata that is lost."""
    folder = tiny(variant)
    same(convert(folder, tmp_path / "m.gguf", Probe(folder).config), folder)


def test_llama3_rope(tiny: Tiny, tmp_path: Path) -> None:
    """Guards against rope_freqs that are multiplied with instead of divided by, or ignored."""
    folder = tiny("llama3-rope")
    factors = llama3_factors(LLAMA3_ROPE, 16)
    assert factors.min() == 1.0 and factors.max() == 8.0 and len(set(factors)) > 2
    with_factors = convert(folder, tmp_path / "m.gguf", Probe(folder).config, rope_freqs=factors)
    same(with_factors, folder, tolerance=1e-5)
    without = convert(folder, tmp_path / "plain.gguf", Probe(folder).config)
    with pytest.raises(AssertionError, match="is off by"):
        same(without, folder, tolerance=1e-2)


def test_linear_rope(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama-linear-rope")
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    same(convert(folder, tmp_path / "m.gguf", Probe(folder).config, metadata=scaling), folder)


@pytest.mark.parametrize("variant", ["gemma3", "gemma3-untied", "gemma3-linear-rope"])
def test_gemma3(tmp_path: Path, variant: str) -> None:
    """Guards against norm weights raised by one twice, and local layers with the global rope."""
    folder = make(
        tmp_path / "folder", variant, settings={"query_pre_attn_scalar": 16}
    )  # the files take it for head_dim
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0} if "linear" in variant else None
    same(convert(folder, tmp_path / "m.gguf", Probe(folder).config, metadata=scaling), folder)


@pytest.mark.parametrize("variant", ["qwen2", "qwen2-one-kv-head", "qwen3", "qwen3-tied"])
def test_qwen(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    """Guards against biases that are lost, head norms of the other projection, and rows put into an order that these
    files are not in."""
    folder = tiny(variant)
    same(convert(folder, tmp_path / "m.gguf", Probe(folder).config), folder)


def test_qwen_without_its_biases(tiny: Tiny, tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "qwen2")
    values = tensors_of(folder)
    del values["model.layers.1.self_attn.k_proj.bias"]
    save_tensors(folder, values)
    file = convert(folder, tmp_path / "m.gguf", Probe(tiny("qwen2")).config)
    with pytest.raises(ModelFormatError, match=r"blk\.1\.attn_k\.bias: tensor is missing"):
        Probe(file)
    with pytest.raises(ModelFormatError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias: tensor is missing"):
        Probe(folder)


def test_gemma3_27b_scale(tmp_path: Path) -> None:
    """The files of Gemma 3 27B do not name its scale, 1 / sqrt(hidden / heads); its 62 layers tell it apart."""
    settings = {"num_hidden_layers": 62, "query_pre_attn_scalar": 8}
    folder = make(tmp_path / "folder", "gemma3", settings=settings)
    same(convert(folder, tmp_path / "m.gguf", Probe(folder).config), folder, tolerance=1e-5)


@pytest.mark.parametrize(
    "quant", [Quant.Q4_0, Quant.Q4_1, Quant.Q5_1, Quant.Q8_0, Quant.F16, Quant.BF16], ids=lambda q: q.name
)
@pytest.mark.parametrize("variant", ["llama-grouped-heads", "qwen2", "qwen3"])
def test_quantised(tiny: Tiny, tmp_path: Path, quant: Quant, variant: str) -> None:
    """The file's values, no more and no less exact: guards against rows of a block format that move as half blocks."""
    folder = tiny(variant)
    file = convert(folder, tmp_path / "m.gguf", Probe(folder).config, quant=quant)
    plain = make(tmp_path / "folder", variant)
    values = tensors_of(plain)
    for name, weights in values.items():
        if weights.ndim > 1:
            values[name] = gguf.dequantize(gguf.quantize(weights, quant), quant).astype(np.float32)
    save_tensors(plain, values)
    same(file, plain)


@pytest.mark.parametrize(
    ("metadata", "error", "text"),
    [
        ({"block_count": 0}, ModelFormatError, r"llama\.block_count"),
        ({"block_count": "two"}, ModelFormatError, r"llama\.block_count: must be of type int, not str"),
        ({"attention.head_count": 0}, ModelFormatError, "num_heads"),
        ({"attention.head_count_kv": 3}, ModelFormatError, "num_kv_heads.*must divide"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, ModelFormatError, "norm_eps"),
        ({"attention.value_length": 4}, UnsupportedModelError, r"attention\.value_length"),
        ({"rope.freq_base": -1.0}, ModelFormatError, "rope theta"),
        ({"rope.dimension_count": 7}, ModelFormatError, "rope dimension"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, UnsupportedModelError, "yarn"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, UnsupportedModelError, "factor 0"),
        ({"expert_count": 8}, UnsupportedModelError, r"llama\.expert_count=8"),
        ({"final_logit_softcapping": 30.0}, UnsupportedModelError, "final_logit_softcapping"),
        ({"embedding_length": 48}, ModelFormatError, r"token_embd\.weight: has shape"),
        ({"context_length": 0}, ModelFormatError, "max_position"),
    ],
)
def test_metadata_at_fault_is_named(
    tiny: Tiny, tmp_path: Path, metadata: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Guards against a crash, or a model that answers nonsense, where the file contradicts itself."""
    folder = tiny("llama-grouped-heads")
    file = convert(folder, tmp_path / "m.gguf", Probe(folder).config, metadata=metadata)
    with pytest.raises(error, match=text):
        Probe(file)


def test_wrong_number_of_rope_factors(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama-grouped-heads")
    file = convert(folder, tmp_path / "m.gguf", Probe(folder).config, rope_freqs=np.ones(3, np.float32))
    with pytest.raises(ModelFormatError, match=r"rope_freqs\.weight: must be 4 numbers"):
        Probe(file)


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = ", ".join(sorted(by_gguf_architecture()))
    with pytest.raises(UnsupportedModelError, match=f"'mamba' is not supported; supported: {known}"):
        Probe(tmp_path / "m.gguf")
