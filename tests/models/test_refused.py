"""Model folders that cannot be computed rightly are refused, and the message names what is at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.build import loading
from octavo.config import EngineConfig
from octavo.core.errors import ModelFormatError, UnsupportedModelError
from octavo.core.want import Sample
from octavo.models.families import by_model_type
from tests.models.probe import GREEDY, Probe
from tests.models.tiny import edit_config, make, save_tensors, tensors_of, tokens

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "llama-grouped-heads")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model_type": "mamba"},
            f"model_type 'mamba' is not supported; supported: {', '.join(sorted(by_model_type()))}",
        ),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_unsupported_settings(folder: Path, changes: dict[str, Any], text: str) -> None:
    """Guards against a model that is computed as if the setting were not there."""
    edit_config(folder, lambda values: values.update(changes))
    with pytest.raises(UnsupportedModelError) as caught:
        Probe(folder)
    assert text in str(caught.value)
    assert "config.json" in str(caught.value)


def _edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    save_tensors(folder, tensors)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.pop(Q_PROJ), f"{Q_PROJ}: tensor is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight: tensor is missing"),
        (
            lambda t: t.update({Q_PROJ: np.zeros((32, 16), np.float32)}),
            f"{Q_PROJ}: has shape (32, 16); the configuration says (32, 32)",
        ),
        (
            lambda t: t.update({Q_PROJ: np.zeros((32, 32, 1), np.float32)}),
            f"{Q_PROJ}: has shape (32, 32, 1)",
        ),
        (
            lambda t: t.update({Q_PROJ.replace("weight", "bias"): np.zeros(32, np.float32)}),
            "hold weights that a llama model does not have: " + Q_PROJ.replace("weight", "bias"),
        ),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((64, 32), np.float32)}), "layers.2.mlp"),
    ],
)
def test_tensors_at_fault_are_named(folder: Path, edit: Callable[[dict[str, Any]], None], text: str) -> None:
    """Guards against biases that are ignored, and against layers that are silently left out."""
    _edited(folder, edit)
    with pytest.raises(ModelFormatError) as caught:
        Probe(folder)
    assert text in str(caught.value)


@pytest.mark.parametrize("shape", [(16,), (33,), (32, 1)])
def test_biases_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = Q_PROJ.replace("weight", "bias")
    folder = make(tmp_path, "qwen2")
    _edited(folder, lambda t: t.update({name: np.zeros(shape, np.float32)}))
    with pytest.raises(ModelFormatError) as caught:
        Probe(folder)
    assert f"{name}: has shape {shape}; the configuration says (32,)" in str(caught.value)


def test_a_bias_that_the_family_does_not_have(tmp_path: Path) -> None:
    """Guards against one more bias, of the output projection, that is silently left out."""
    folder = make(tmp_path, "qwen2")
    name = Q_PROJ.replace("q_proj.weight", "o_proj.bias")
    _edited(folder, lambda t: t.update({name: np.zeros(32, np.float32)}))
    with pytest.raises(ModelFormatError, match="weights that a qwen2 model does not have: model"):
        Probe(folder)


def test_integer_weights(folder: Path) -> None:
    _edited(folder, lambda t: t.update({Q_PROJ: np.zeros((32, 32), np.int32)}))
    with pytest.raises(UnsupportedModelError, match="I32 weights cannot be dequantised"):
        Probe(folder)


def test_stored_frequencies_are_no_weights(folder: Path) -> None:
    """Old checkpoints hold rotary_emb.inv_freq; the configuration gives the same. Guards against refusing them."""
    before = Probe(folder).logits(tokens(9))
    _edited(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    np.testing.assert_array_equal(Probe(folder).logits(tokens(9)), before)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_are_ignored_take_no_memory(tmp_path: Path, tied: bool) -> None:
    """Guards against refusing a multimodal model for the size of a vision tower that is not loaded, or of a head that
    is the embedding."""
    folder = make(tmp_path, "gemma3-untied")

    def planned() -> int:
        with loading(EngineConfig.resolve({"model": str(folder)})) as loaded:
            return loaded.memory_plan.weights_bytes

    if tied:
        edit_config(folder, lambda values: values.update(tie_word_embeddings=True))
        _edited(folder, lambda t: t.pop("lm_head.weight"))
    before = planned()
    _edited(folder, lambda t: t.update({"vision_tower.encoder.weight": np.ones((2048, 2048), np.float32)}))
    _edited(folder, lambda t: t.update({"multi_modal_projector.bias": np.ones(4096, np.float32)}))
    if tied:
        _edited(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert planned() == before
    if tied:  # the one that is stored is both
        _edited(folder, lambda t: t.pop("model.embed_tokens.weight"))
        assert planned() == before


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_weights_fail_only_requests_that_meet_them(folder: Path) -> None:
    """A damaged row of the embedding is an error of the requests whose tokens use it, not of their batch, and no token
    is drawn from NaN."""

    def damage(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][7] = np.nan

    clean = [token for token in tokens(20) if token != 7]
    expected, _ = Probe(folder).greedy(clean, 1)
    _edited(folder, damage)
    probe = Probe(folder)
    prompts = [clean, [7, *clean], clean]
    grants = [(probe.sequence(prompt), len(prompt), Sample((GREEDY,))) for prompt in prompts]
    for next_logprobs in (None, 2):
        for sequence, _, _ in grants:
            sequence.num_computed = 0
        good, bad, also_good = probe.step(*grants, next_logprobs=next_logprobs)
        assert bad.error is not None and "NaN" in bad.error and not bad.rows
        for result in (good, also_good):
            assert result.error is None
            assert [draw.token_id for draw in result.rows[-1].draws] == expected
