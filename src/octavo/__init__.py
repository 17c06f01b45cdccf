"""Octavo: an LLM inference engine for work that branches.

The public names are loaded on first use, so that ``import octavo`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.ask import AskDone, AskResult, AskRun, AsyncAskRun
    from octavo.async_llm import AsyncLLM
    from octavo.async_session import AsyncBranch, AsyncSession
    from octavo.config import EngineConfig
    from octavo.core.ask import Citation, DocumentEvent, IndexProgress, Retrieved, Source
    from octavo.core.ask_params import AskParams, AskPrompts
    from octavo.core.beam_params import BeamSearchParams
    from octavo.core.errors import (
        ConfigError,
        DownloadError,
        EngineClosedError,
        InvalidRequestError,
        ModelFormatError,
        ModelNotFoundError,
        OctavoError,
        OutOfMemoryError,
        RequestFailedError,
        UnsupportedModelError,
    )
    from octavo.core.margins import (
        AnswerBegun,
        AnswerDelta,
        Margin,
        MarginDecided,
        MarginWritten,
        ReviewBegun,
        Segment,
        SegmentRead,
    )
    from octavo.core.margins_params import MarginsParams, MarginsPrompts
    from octavo.core.outputs import (
        CacheExplanation,
        CacheStats,
        Choice,
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        SelectResult,
    )
    from octavo.core.params import OutputKind, RepetitionDetectionParams, SamplingParams
    from octavo.core.pooling import EmbeddingOutput, EmbeddingRequestOutput, PoolingParams
    from octavo.core.proposer import SpeculationStats
    from octavo.core.speculation import SpeculativeConfig
    from octavo.core.structured import StructuredOutputsParams
    from octavo.documents.readers import DocumentError
    from octavo.frontend import ChatPrompt, Messages, Prompt
    from octavo.llm import LLM
    from octavo.margins import AsyncMarginsRun, MarginsAnswer, MarginsDone, MarginsResult, MarginsRun
    from octavo.session import Branch, Session

__version__ = "0.1.0"

# module -> what is public of it
_MODULES = {
    "octavo.ask": ("AskDone", "AskResult", "AskRun", "AsyncAskRun"),
    "octavo.async_llm": ("AsyncLLM",),
    "octavo.async_session": ("AsyncBranch", "AsyncSession"),
    "octavo.config": ("EngineConfig",),
    "octavo.core.ask": ("Citation", "DocumentEvent", "IndexProgress", "Retrieved", "Source"),
    "octavo.core.ask_params": ("AskParams", "AskPrompts"),
    "octavo.core.beam_params": ("BeamSearchParams",),
    "octavo.core.errors": (
        "ConfigError",
        "DownloadError",
        "EngineClosedError",
        "InvalidRequestError",
        "ModelFormatError",
        "ModelNotFoundError",
        "OctavoError",
        "OutOfMemoryError",
        "RequestFailedError",
        "UnsupportedModelError",
    ),
    "octavo.core.margins": (
        "AnswerBegun",
        "AnswerDelta",
        "Margin",
        "MarginDecided",
        "MarginWritten",
        "ReviewBegun",
        "Segment",
        "SegmentRead",
    ),
    "octavo.core.margins_params": ("MarginsParams", "MarginsPrompts"),
    "octavo.core.outputs": (
        "CacheExplanation",
        "CacheStats",
        "Choice",
        "CompletionOutput",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
        "SelectResult",
    ),
    "octavo.core.params": ("OutputKind", "RepetitionDetectionParams", "SamplingParams"),
    "octavo.core.pooling": ("EmbeddingOutput", "EmbeddingRequestOutput", "PoolingParams"),
    "octavo.core.proposer": ("SpeculationStats",),
    "octavo.core.speculation": ("SpeculativeConfig",),
    "octavo.core.structured": ("StructuredOutputsParams",),
    "octavo.documents.readers": ("DocumentError",),
    "octavo.frontend": ("ChatPrompt", "Messages", "Prompt"),
    "octavo.llm": ("LLM",),
    "octavo.margins": ("AsyncMarginsRun", "MarginsAnswer", "MarginsDone", "MarginsResult", "MarginsRun"),
    "octavo.session": ("Branch", "Session"),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLM",
    "AnswerBegun",
    "AnswerDelta",
    "AskDone",
    "AskParams",
    "AskPrompts",
    "AskResult",
    "AskRun",
    "AsyncAskRun",
    "AsyncBranch",
    "AsyncLLM",
    "AsyncMarginsRun",
    "AsyncSession",
    "BeamSearchParams",
    "Branch",
    "CacheExplanation",
    "CacheStats",
    "ChatPrompt",
    "Choice",
    "Citation",
    "CompletionOutput",
    "ConfigError",
    "DocumentError",
    "DocumentEvent",
    "DownloadError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineClosedError",
    "EngineConfig",
    "IndexProgress",
    "InvalidRequestError",
    "Logprob",
    "Margin",
    "MarginDecided",
    "MarginWritten",
    "MarginsAnswer",
    "MarginsDone",
    "MarginsParams",
    "MarginsPrompts",
    "MarginsResult",
    "MarginsRun",
    "Messages",
    "ModelFormatError",
    "ModelNotFoundError",
    "OctavoError",
    "OutOfMemoryError",
    "OutputKind",
    "PoolingParams",
    "Prompt",
    "RepetitionDetectionParams",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "Retrieved",
    "ReviewBegun",
    "SamplingParams",
    "Segment",
    "SegmentRead",
    "SelectResult",
    "Session",
    "Source",
    "SpeculationStats",
    "SpeculativeConfig",
    "StructuredOutputsParams",
    "UnsupportedModelError",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker is to know the names above and no others

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'octavo' has no attribute {name!r}")
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
