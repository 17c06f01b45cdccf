"""Every family against transformers: random tiny models, all positions, one row at a time and all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.backends.cpu import CpuOps
from octavo.cli.logits import LoadedModel
from octavo.core.want import Hidden
from octavo.loading.hf_config import config_from_folder
from tests.models.gguf_files import convert
from tests.models.probe import Probe
from tests.models.tiny import SIZES, VARIANTS, edit_config, exact_oracle, make, oracle, tokens
from tests.oracle.compare import Tally
from tests.oracle.oracle import all_logits

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 9, 96])
def test_logits(tiny: Tiny, variant: str, length: int) -> None:
    """Guards against any error in a model's arithmetic: masks, windows, rotations, norms, scales, head grouping. 96
    tokens go past the windows (8) and the original context of the Llama 3 rope (32)."""
    tally = Tally()
    tally.rows(Probe(tiny(variant)).logits(tokens(length)), all_logits(oracle(tiny(variant)), tokens(length)))
    print(f"{variant}, {length} tokens: {tally.worst:.2e}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_float64(tiny: Tiny, variant: str) -> None:
    """In float64 nothing but the order of sums may differ: guards against errors that float32 rounding could hide."""
    probe = Probe(tiny(variant), dtype="float64")
    layers = dict(zip(_layer_types(tiny(variant)), probe.config.layers, strict=True))
    model = exact_oracle(tiny(variant), lambda kind: layers[kind].rope)
    ours = probe.logits(tokens(96))
    assert ours.dtype == np.float64
    Tally().rows(ours, all_logits(model, tokens(96)), tolerance=1e-11)


def _layer_types(folder: Path) -> list[str]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens(tiny: Tiny, variant: str) -> None:
    """Guards against errors that only decoding one token at a time from cached KV has. Teacher forcing: transformers
    reads prompt and our tokens in one pass."""
    prompt = tokens(11, seed=5)
    chosen, rows = Probe(tiny(variant), block_size=1).greedy(prompt, 40)
    theirs = all_logits(oracle(tiny(variant)), prompt + chosen[:-1], first=len(prompt) - 1)
    tally = Tally()
    tally.rows(rows, theirs)
    tally.choices(chosen, rows, theirs)
    assert tally.tokens == 40
    assert not tally.excused
    assert len(set(chosen)) > 1, "a model that repeats itself shows little"


@pytest.mark.parametrize("variant", ["qwen2-window", "qwen3", "qwen3-window"])
@pytest.mark.parametrize("packed", ["folder", "gguf"])
def test_logits_on_the_cpu_backend(tmp_path: Path, variant: str, packed: str) -> None:
    """In float32, with heads of 16, which that backend asks for."""
    folder = path = make(tmp_path / "folder", variant, settings={"hidden_size": 64, "head_dim": 16})
    config = config_from_folder(folder)
    if packed == "gguf":
        if "window" in variant:
            pytest.skip("these files do not say where a window begins")
        path = convert(folder, tmp_path / "m.gguf", config)
    ops = CpuOps(threads=2, kv_dtype="float32", compute_dtype="float32")
    Tally().rows(LoadedModel(path, config, ops).logits(tokens(96)), all_logits(oracle(folder), tokens(96)))


@pytest.mark.parametrize("variant", ["llama-grouped-heads", "mistral-window", "gemma3", "qwen2-window"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_of_a_prompt(tiny: Tiny, variant: str, chunk: int) -> None:
    """Guards against masks that are right only when a prompt comes whole."""
    whole, chunked = Probe(tiny(variant)), Probe(tiny(variant), block_size=chunk)
    Tally().rows(chunked.logits(tokens(60), chunk=chunk), whole.logits(tokens(60)), tolerance=1e-5)


@pytest.mark.parametrize("variant", ["llama-tied", "mistral-window", "gemma3", "qwen2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_types(tmp_path: Path, variant: str, dtype: str) -> None:
    """Guards against 16-bit weights that are widened wrongly."""
    folder = make(tmp_path, variant, dtype=dtype)
    Tally().rows(Probe(folder).logits(tokens(40)), all_logits(oracle(folder), tokens(40)))


def test_shards(tmp_path: Path) -> None:
    """Guards against a tensor taken from the wrong shard."""
    folder = make(tmp_path, "llama-grouped-heads", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    Tally().rows(Probe(folder).logits(tokens(40)), all_logits(oracle(folder), tokens(40)))


def _old_llama(values: dict[str, Any]) -> None:
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope if rope["rope_type"] != "default" else None


def _oldest_llama(values: dict[str, Any]) -> None:
    _old_llama(values)
    values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")


def _old_qwen(values: dict[str, Any]) -> None:
    _old_llama(values)
    del values["layer_types"]


def _old_gemma3(values: dict[str, Any]) -> None:
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope["full_attention"].pop("rope_theta")
    values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    values["rope_scaling"] = rope["full_attention"] if rope["full_attention"]["rope_type"] != "default" else None
    del values["layer_types"]
    values["sliding_window_pattern"] = 6


@pytest.mark.parametrize(
    ("variant", "edit"),
    [
        ("llama-grouped-heads", _old_llama),
        ("llama3-rope", _old_llama),
        ("llama-linear-rope", _oldest_llama),
        ("mistral-window", _old_llama),
        ("gemma3", _old_gemma3),
        ("gemma3-linear-rope", _old_gemma3),
        ("qwen2-window", _old_qwen),
        ("qwen3", _old_qwen),
    ],
)
def test_config_as_transformers_4_wrote_it(
    tmp_path: Path, variant: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    """Guards against a rope base, scaling or window that is lost with the older keys; transformers reads both forms."""
    folder = make(tmp_path, variant)
    new = Probe(folder)
    edit_config(folder, edit)
    old = Probe(folder)
    assert old.config == new.config
    Tally().rows(old.logits(tokens(40)), all_logits(oracle(folder), tokens(40)))


def test_gemma3_inside_a_multimodal_folder(tmp_path: Path) -> None:
    """Google's larger Gemma 3 say only what differs from the defaults, beside a vision tower. Guards against other
    defaults than transformers', and against vision weights that stop the text model from loading."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {key: SIZES[key] for key in ("hidden_size", "intermediate_size")}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    given = text | {"num_hidden_layers": 6, "sliding_window": 8, "vocab_size": 131, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=given, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).float().eval()
    model.save_pretrained(tmp_path)
    minimal = given | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    edit_config(tmp_path, lambda values: values.update(text_config=minimal))
    theirs = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    Tally().rows(Probe(tmp_path).logits(tokens(40)), all_logits(theirs, tokens(40)))


def test_hidden_states(tiny: Tiny) -> None:
    """Guards against hidden states of the wrong layer, row or sequence. 0 is the embedding; transformers' last one has
    gone through the final norm, so it is left out."""
    for variant in ("llama-grouped-heads", "gemma3"):
        probe = Probe(tiny(variant))
        model = oracle(tiny(variant))
        asked = tuple(reversed(range(probe.config.num_layers)))
        prompts = [tokens(5, seed=2), tokens(17, seed=3)]
        results = probe.step(*((probe.sequence(prompt), len(prompt), Hidden(asked)) for prompt in prompts))
        for prompt, result in zip(prompts, results, strict=True):
            with torch.no_grad():
                theirs = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            for layer, state in zip(asked, result.rows[0].hidden, strict=True):
                np.testing.assert_allclose(state, theirs[layer][0, -1].numpy(), atol=1e-4)
