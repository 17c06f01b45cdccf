"""GGUF metadata: nothing in it can do worse than an error that names the key."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.formats import GGUFFile, QuantType, RawTensor
from octavo.loading.gguf_config import config_from_gguf
from octavo.ops import RopeConfig, RopeScaling

SOUND: dict[str, Any] = {
    "block_count": 8,
    "context_length": 128,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
OTHERS = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "expert_count", "final_logit_softcapping"),
)


def tensor(name: str, *shape: int, value: float = 0.0) -> RawTensor:
    values = np.full(shape, value, np.float32)
    return RawTensor(name, shape, QuantType.F32, values.reshape(-1, shape[-1]).view(np.uint8))


def config_of(architecture: str, values: dict[str, Any], *more: RawTensor) -> Any:
    """The part of a GGUFFile that the configuration is made of."""
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}
    tensors = {one.name: one for one in (tensor("token_embd.weight", 100, 32), *more)}
    file = SimpleNamespace(
        path=Path("m.gguf"), metadata={"general.architecture": architecture} | metadata, tensors=tensors
    )
    return config_from_gguf(file)  # type: ignore[arg-type]


def test_smollm2(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        config = config_from_gguf(file)
    assert (config.architecture, config.vocab_size, config.hidden_size, config.intermediate_size) == (
        *("llama", 49152, 576),
        1536,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position) == (9, 3, 64, 8192)
    assert config.num_layers == 30 and config.tie_embeddings
    assert set(config.layers) == {config.layers[0]}
    assert config.layers[0].rope == RopeConfig(100_000.0, 64) and config.layers[0].window is None
    assert config.score_scale == 1 / 8


def test_gemma3(gemma3_path: Path) -> None:
    with GGUFFile(gemma3_path) as file:
        config = config_from_gguf(file)
    assert (config.architecture, config.vocab_size, config.num_layers) == ("gemma3", 262_144, 18)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 256)
    everything = [index for index, layer in enumerate(config.layers) if layer.window is None]
    assert everything == [5, 11, 17]
    assert {layer.rope.theta for layer in config.layers if layer.window == 512} == {10_000.0}
    assert {config.layers[index].rope.theta for index in everything} == {1_000_000.0}
    assert config.norm_offset == 0.0  # the file's norms are raised by one already


def test_defaults() -> None:
    config = config_of("llama", SOUND)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (4, 8, True)
    assert config.layers[0].rope == RopeConfig(10_000.0, 8)
    assert not config_of("llama", SOUND, tensor("output.weight", 100, 32)).tie_embeddings


@pytest.mark.parametrize("key", list(SOUND))
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ModelFormatError, match=f"llama.{key}: is missing"):
        config_of("llama", {name: value for name, value in SOUND.items() if name != key})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_rope_factors(value: float) -> None:
    with pytest.raises(ModelFormatError, match=r"rope_freqs\.weight"):
        config_of("llama", SOUND, tensor("rope_freqs.weight", 4, value=value))


def test_rope_factors_are_counted_before_they_are_unpacked() -> None:
    """Guards against a few megabytes in the file that become hundreds in memory before they are refused."""
    many = RawTensor("rope_freqs.weight", (60_000, 256), QuantType.Q2_K, np.zeros((60_000, 84), np.uint8))
    tracemalloc.start()
    with pytest.raises(ModelFormatError, match=r"rope_freqs\.weight: must be 4 numbers, not 15360000"):
        config_of("llama", SOUND, many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_of_many_rope_factors(tmp_path: Path) -> None:
    """The same of a whole file of 5.3 MB: it is refused with less than 32 MB more than the process has anyway."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in SOUND.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 32), np.float32))
    codes = np.zeros((60_000, 84), np.uint8)
    writer.add_tensor("rope_freqs.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    program = """
import sys
from resource import RUSAGE_SELF, getrusage
from octavo.core.errors import ModelFormatError
from octavo.formats import GGUFFile
from octavo.loading.gguf_config import config_from_gguf
before = getrusage(RUSAGE_SELF).ru_maxrss
with GGUFFile(sys.argv[1]) as file:
    try:
        config_from_gguf(file)
    except ModelFormatError as error:
        print(getrusage(RUSAGE_SELF).ru_maxrss - before, error.field)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "m.gguf")]
    kib, field = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    assert field == "rope_freqs.weight" and int(kib) < 32 << 10


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),  # as llama.cpp takes it
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", factor=4.0)),  # the key of the first files
        ({"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, RopeScaling("linear", factor=2.0)),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, RopeScaling("linear", factor=4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({}, None),
    ],
)
def test_rope_scaling(values: dict[str, Any], expected: RopeScaling | None) -> None:
    assert config_of("llama", SOUND | values).layers[0].rope.scaling == expected
    gemma = config_of("gemma3", SOUND | values)
    assert [gemma.layers[index].rope.scaling for index in (0, 5)] == [None, expected]  # global layers only


def test_rope_factors_are_scaled_too() -> None:
    config = config_of("llama", SOUND | {"rope.scaling.factor": 4.0}, tensor("rope_freqs.weight", 4, value=2.0))
    assert config.layers[0].rope.scaling == RopeScaling("factors", factors=(8.0,) * 4)
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type='yarn'"):
        config_of("llama", SOUND | {"rope.scaling.type": "yarn"}, tensor("rope_freqs.weight", 4, value=2.0))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen(architecture: str) -> None:
    """Guards against a window on every layer: files may name one, but not where it begins or whether it is used."""
    config = config_of(architecture, SOUND | {"attention.key_length": 12, "attention.value_length": 12})
    assert (config.architecture, config.head_dim, config.num_layers) == (architecture, 12, 8)
    windows = config_of(architecture, SOUND | {"attention.sliding_window": 16}).layers
    assert {layer.window for layer in windows} == {None}
    with pytest.raises(UnsupportedModelError, match=rf"{architecture}\.rope\.scaling\.type='yarn'"):
        config_of(architecture, SOUND | {"rope.scaling.type": "yarn"})


def test_other_patterns_of_windows() -> None:
    config = config_of("gemma3", SOUND | {"attention.sliding_window": 16, "attention.sliding_window_pattern": 3})
    assert [layer.window for layer in config.layers] == [16, 16, None, 16, 16, None, 16, 16]
    with pytest.raises(ModelFormatError, match="sliding_window_pattern"):
        config_of("gemma3", SOUND | {"attention.sliding_window_pattern": 0})


@pytest.mark.parametrize("value", [[0, 1], np.zeros(3), np.zeros(0), "0", True, 8])
def test_what_is_not_built_is_refused_whatever_its_type(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_count"):
        config_of("llama", SOUND | {"expert_count": value})


@pytest.mark.parametrize("value", [-1, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize("key", ["attention.sliding_window", "block_count", "context_length", "embedding_length"])
def test_integers_beyond_all_reason(key: str, value: int) -> None:
    with pytest.raises(ModelFormatError, match=f"llama.{key}"):
        config_of("llama", SOUND | {key: value})


_VALUES = st.one_of(
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 2**64 - 1, -(2**63)]),
    st.floats(),
    st.sampled_from(["", "none", "linear", "yarn"]),
    st.lists(st.integers(0, 4), max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(
    architecture=st.sampled_from(["llama", "gemma3", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from([*SOUND, *OTHERS]), _VALUES, min_size=1, max_size=3),
)
def test_any_values(architecture: str, changes: dict[str, Any]) -> None:
    try:
        config = config_of(architecture, SOUND | changes)
    except (ModelFormatError, UnsupportedModelError) as error:
        assert "m.gguf" in str(error)
        return
    assert math.isfinite(config.score_scale) and config.score_scale > 0
    for layer in config.layers:
        frequencies = layer.rope.inverse_frequencies()
        assert (frequencies >= 0).all() and (frequencies < float("inf")).all()
