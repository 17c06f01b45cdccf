"""Octavo: an LLM inference engine for work that branches.

The public names are loaded on first use, so that ``import octavo`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.config import EngineConfig
    from octavo.core.beam_params import BeamSearchParams
    from octavo.core.errors import OctavoError
    from octavo.core.outputs import CompletionOutput, RequestOutput
    from octavo.core.params import RepetitionDetectionParams, SamplingParams
    from octavo.llm import LLM
    from octavo.session import Session

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "EngineConfig": "octavo.config",
    "SamplingParams": "octavo.core.params",
    "RepetitionDetectionParams": "octavo.core.params",
    "BeamSearchParams": "octavo.core.beam_params",
    "RequestOutput": "octavo.core.outputs",
    "CompletionOutput": "octavo.core.outputs",
    "OctavoError": "octavo.core.errors",
    "Session": "octavo.session",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "OctavoError",
    "RepetitionDetectionParams",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
