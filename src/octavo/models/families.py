"""The families there are: adding one takes a line here, its file, and tests. See docs/adding-a-family.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo.models.descriptor import Family


class Listed(NamedTuple):
    """Where a family is and what files call it. Its module is imported when a file asks for it."""

    descriptor: str  # module:name of a Family
    model_types: tuple[str, ...]  # of config.json
    gguf: tuple[str, ...]  # general.architecture


FAMILIES: dict[str, Listed] = {
    "llama": Listed("octavo.models.llama:LLAMA", ("llama", "mistral"), ("llama",)),
    "gemma3": Listed("octavo.models.gemma:GEMMA3", ("gemma3", "gemma3_text"), ("gemma3",)),
    "qwen2": Listed("octavo.models.qwen:QWEN2", ("qwen2",), ("qwen2",)),
    "qwen3": Listed("octavo.models.qwen:QWEN3", ("qwen3",), ("qwen3",)),
}


def family(name: str) -> Family:
    """`name` is a key of FAMILIES."""
    module, variable = FAMILIES[name].descriptor.split(":")
    found: Family = getattr(importlib.import_module(module), variable)
    return found


def by_model_type() -> dict[str, str]:
    """model_type of config.json -> family."""
    return {kind: name for name, listed in FAMILIES.items() for kind in listed.model_types}


def by_gguf_architecture() -> dict[str, str]:
    """general.architecture of GGUF files -> family."""
    return {kind: name for name, listed in FAMILIES.items() for kind in listed.gguf}
