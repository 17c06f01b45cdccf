"""config.json: what is read, what is refused, and that nothing in it can do worse than an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.loading.hf_config import config_from_folder
from octavo.ops import Activation, ModelConfig, RopeConfig, RopeScaling

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
}


def read(folder: Path, values: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return config_from_folder(folder)


def test_llama_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (4, 8, False)
    assert (config.activation, config.norm_offset, config.embedding_scale) == (Activation.SILU, 0.0, 1.0)
    assert config.score_scale == 8**-0.5
    assert [(layer.window, layer.rope) for layer in config.layers] == [(None, RopeConfig(10_000.0, 8))] * 2


def test_gemma3_defaults(tmp_path: Path) -> None:
    """Those of transformers' Gemma3TextConfig."""
    from transformers import Gemma3TextConfig

    theirs = Gemma3TextConfig(**{key: value for key, value in GEMMA3.items() if key != "model_type"})
    config = read(tmp_path, GEMMA3)
    assert config.vocab_size == theirs.vocab_size
    assert (config.num_heads, config.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (config.head_dim, config.max_position) == (theirs.head_dim, theirs.max_position_embeddings)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.score_scale == theirs.query_pre_attn_scalar**-0.5
    assert (config.activation, config.norm_offset) == (Activation.GELU_TANH, 1.0)
    assert (config.embedding_scale, config.tie_embeddings) == (8.0, theirs.tie_word_embeddings)
    for layer, kind in zip(config.layers, theirs.layer_types, strict=True):
        assert layer.rope.theta == theirs.rope_parameters[kind]["rope_theta"]
        assert layer.window == (theirs.sliding_window if kind == "sliding_attention" else None)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 15},
        {"tie_word_embeddings": True, "head_dim": 24},
        {"num_key_value_heads": None},
    ],
)
def test_qwen_is_read_as_in_transformers(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    given = ("hidden_size", "intermediate_size", "vocab_size")
    values = {key: LLAMA[key] for key in given} | {"model_type": kind, "num_hidden_layers": 30}
    config = read(tmp_path, values | {"num_attention_heads": 16, "num_key_value_heads": 8} | changes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (config.architecture, config.num_kv_heads) == (kind, theirs.num_key_value_heads)
    heads = theirs.hidden_size // theirs.num_attention_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or heads)
    assert (config.max_position, config.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert config.tie_embeddings == theirs.tie_word_embeddings
    windows = [theirs.sliding_window if name == "sliding_attention" else None for name in theirs.layer_types]
    assert [layer.window for layer in config.layers] == windows
    assert {layer.rope.theta for layer in config.layers} == {theirs.rope_parameters["rope_theta"]}


def test_qwen_leaves_out_what_transformers_knows(tmp_path: Path) -> None:
    """As many KV heads as transformers has where the key is missing; where it is null, as many as there are heads."""
    values = LLAMA | {"model_type": "qwen2", "num_attention_heads": 64, "hidden_size": 128}
    assert read(tmp_path, values).num_kv_heads == 32
    assert read(tmp_path, values | {"num_key_value_heads": None}).num_kv_heads == 64


def test_biases_of_qwen(tmp_path: Path) -> None:
    """Qwen 2 has them whatever the file says, as in transformers; Qwen 3 with them is not built."""
    assert read(tmp_path, LLAMA | {"model_type": "qwen2", "attention_bias": False, "num_key_value_heads": 4})
    with pytest.raises(UnsupportedModelError, match="attention_bias=True is not supported"):
        read(tmp_path, LLAMA | {"model_type": "qwen3", "attention_bias": True, "num_key_value_heads": 4})
    with pytest.raises(UnsupportedModelError, match="dual_chunk_attention_config="):
        read(tmp_path, LLAMA | {"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 8}})
    with pytest.raises(UnsupportedModelError, match="rope type 'yarn' is not supported; supported: default, linear"):
        rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        read(tmp_path, LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4, "rope_scaling": rope})


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    left_out = ("max_position_embeddings", "rms_norm_eps")
    values = {key: value for key, value in LLAMA.items() if key not in left_out} | {"model_type": kind}
    values |= {"num_attention_heads": 8}
    config = read(tmp_path, values)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (config.max_position, config.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert config.num_kv_heads == theirs.num_key_value_heads


def test_gemma3_has_its_own_key_for_the_activation(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3 | {"hidden_act": "silu"})  # transformers' Gemma 3 does not look at this one
    assert config.activation is Activation.GELU_TANH
    with pytest.raises(UnsupportedModelError, match="'relu'"):
        read(tmp_path, GEMMA3 | {"hidden_activation": "relu"})


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    ],
)
def test_old_and_new_keys_together_are_as_in_transformers(tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    from transformers import AutoConfig

    if kind == "gemma3_text" and rope.get("rope_parameters"):
        local = {"rope_type": "default", "rope_theta": 50.0}
        rope = rope | {"rope_parameters": {"full_attention": rope["rope_parameters"], "sliding_attention": local}}
    config = read(tmp_path, (LLAMA | {"model_type": kind} if kind == "llama" else GEMMA3) | rope)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    for index, name in ((0, "sliding_attention"), (5, "full_attention")):
        parameters = theirs.get(name, theirs)
        layer = config.layers[min(index, config.num_layers - 1)]
        factor = parameters["factor"] if parameters["rope_type"] == "linear" else None
        assert layer.rope.theta == parameters["rope_theta"]
        assert layer.rope.scaling == (None if factor is None else RopeScaling("linear", factor))


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 16}, [None, None]),  # transformers' Llama has none
        ({"model_type": "mistral"}, [4096, 4096]),  # the default of transformers
        ({"model_type": "mistral", "sliding_window": None}, [None, None]),
        ({"model_type": "mistral", "sliding_window": 16}, [16, 16]),
        (
            {"model_type": "mistral", "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
            [None, 16],
        ),
    ],
)
def test_windows(tmp_path: Path, changes: dict[str, Any], windows: list[int | None]) -> None:
    config = read(tmp_path, LLAMA | {"num_key_value_heads": 2} | changes)
    assert [layer.window for layer in config.layers] == windows


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5, 8)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(5e5, 8)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, RopeConfig(5e5, 8)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(5e5, 8, RopeScaling("linear", 2.0)),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            RopeConfig(10_000.0, 8, RopeScaling("llama3", 32.0, 1.0, 4.0, 64)),
        ),
    ],
)
def test_rope(tmp_path: Path, rope: dict[str, Any], expected: RopeConfig) -> None:
    assert read(tmp_path, LLAMA | rope).layers[0].rope == expected


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({key: None}, key) for key in LLAMA if key != "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": 7}, "rope dimension"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 2.0}, "norm_eps"),
        ({"max_position_embeddings": 1 << 40}, "max_position"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention"),
        ({"rope_scaling": {"type": 7}}, "type"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8, "high_freq_factor": 1}}, "rope scaling"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "mistral", "layer_types": [["full_attention"], {}]}, "layer_types"),
        ({"model_type": "mistral", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (GEMMA3 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA3 | {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar"),
        (GEMMA3 | {"model_type": "gemma3", "text_config": 5}, "text_config"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "max_window_layers": "all"}, "max_window_layers"),
        (
            {"model_type": "qwen3", "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 0},
            "sliding_window",
        ),
        ({"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 0}, "head_dim"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "num_kv_heads"),
    ],
)
def test_the_key_at_fault_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        read(tmp_path, LLAMA | changes)
    assert caught.value.field == field
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1', "\udcff", "[" * 100_000, '{"model_type": NaN}'])
def test_files_that_are_no_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFormatError):
        config_from_folder(tmp_path)


def test_no_file_and_a_file_too_large(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json: no such file"):
        config_from_folder(tmp_path)
    (tmp_path / "config.json").write_text(" " * (1 << 21))
    with pytest.raises(ModelFormatError, match="is larger than"):
        config_from_folder(tmp_path)


_HOSTILE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 5),
        st.sampled_from([10**400, -(10**30), 2**63, 2**31]),
        st.floats(),
        st.sampled_from(["", "linear", "llama3", "full_attention", "sliding_attention", "silu", "default"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "sliding_attention"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=6,
)
_KEYS = sorted(
    {
        *LLAMA,
        *GEMMA3,
        *("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window"),
        *("sliding_window_pattern", "layer_types", "query_pre_attn_scalar", "tie_word_embeddings", "text_config"),
        *("hidden_act", "hidden_activation", "attention_bias", "rope_local_base_freq", "partial_rotary_factor"),
        *("use_sliding_window", "max_window_layers", "dual_chunk_attention_config"),
    }
    - {"model_type"}
)


@settings(max_examples=400, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma3_text", "gemma3", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(_KEYS), _HOSTILE, min_size=1, max_size=3),
)
def test_any_values(tmp_path_factory: pytest.TempPathFactory, family: str, changes: dict[str, Any]) -> None:
    """Guards against crashes of any other kind: unhashable, unorderable, overflowing or not finite values. What is
    accepted is usable."""
    folder = tmp_path_factory.getbasetemp()
    try:
        config = read(folder, LLAMA | changes | {"model_type": family})
    except (ModelFormatError, UnsupportedModelError) as error:
        assert "config.json" in str(error)
        return
    assert math.isfinite(config.score_scale) and config.score_scale > 0
    for layer in config.layers:
        frequencies = layer.rope.inverse_frequencies()
        assert frequencies.shape == (layer.rope.dim // 2,)
        assert (frequencies >= 0).all() and (frequencies < float("inf")).all()
