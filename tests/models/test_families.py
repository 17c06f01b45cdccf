"""The list of families: what is in it is what is there, and nothing else knows more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import octavo
from octavo.backends.reference import ReferenceOps
from octavo.loading.weights import FileWeights
from octavo.models import FAMILIES, family
from octavo.models.families import by_gguf_architecture, by_model_type
from octavo.ops import Activation, LayerConfig, ModelConfig, RopeConfig
from tests.models.tiny import VARIANTS

ROOT = Path(octavo.__file__).parent


@pytest.mark.parametrize("name", FAMILIES)
def test_a_descriptor_is_what_the_list_says(name: str) -> None:
    found = family(name)
    assert found.name == name
    names = list(found.gguf_layer.values())
    assert len(set(names)) == len(names), "two weights in one place"


def test_no_two_families_claim_a_file() -> None:
    kinds = [kind for listed in FAMILIES.values() for kind in listed.model_types]
    architectures = [kind for listed in FAMILIES.values() for kind in listed.gguf]
    assert len(by_model_type()) == len(kinds) and len(by_gguf_architecture()) == len(architectures)


def test_every_family_is_compared_with_transformers() -> None:
    assert {by_model_type()[kind] for kind, _ in VARIANTS.values()} == set(FAMILIES)


def test_nothing_else_asks_for_a_family() -> None:
    """Guards against `if architecture == ...` outside the family's own file."""
    asked = re.compile(r"architecture\s*(==|!=|in\b)")
    files = [path for path in ROOT.rglob("*.py") if path.parent.name != "models"]
    assert len(files) > 100
    found = [path.name for path in files if asked.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_families_are_imported_when_a_file_asks() -> None:
    """Guards against start-up that grows with the list."""
    program = "import sys, octavo.build; print([m for m in sys.modules if m.startswith('octavo.models.')])"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert "octavo.models.families" in run.stdout
    for listed in FAMILIES.values():
        assert listed.descriptor.split(":")[0] not in run.stdout


def test_a_name_that_gguf_files_have_not() -> None:
    """Guards against a weight taken for another: a model that asks for what its family does not list is wrong."""
    config = ModelConfig(
        *("llama", 10, 8, 12, 2, 1, 4, 64, 1e-5, Activation.SILU, (LayerConfig(RopeConfig(1e4, 4)),)),
        tie_embeddings=True,
    )
    weights = FileWeights(ReferenceOps(), config, "m.gguf", {}, gguf=True)
    for name in ("layers.0.self_attn.q_norm", "layers.0.mlp.router", "position_embeddings"):
        with pytest.raises(LookupError, match=f"llama: GGUF files have no name for {name}"):
            weights.vector(name, 4)
