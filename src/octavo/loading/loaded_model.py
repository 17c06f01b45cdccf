"""A model between the two halves of building an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.formats.mapping import ModelFile
    from octavo.loading.draft_head import LoadedHead
    from octavo.loading.memory import MemoryPlan
    from octavo.models import Model
    from octavo.ops import ModelConfig, Ops


class LoadedDraft(NamedTuple):
    """A small model that guesses for another one."""

    path: Path
    config: ModelConfig
    model: Model


class LoadedModel(NamedTuple):
    """A model whose weights are in memory, or on their way there."""

    path: Path
    file: ModelFile  # open
    config: ModelConfig
    max_model_len: int
    ops: Ops
    memory_plan: MemoryPlan
    model: Model
    draft: LoadedDraft | None = None
    draft_head: LoadedHead | None = None
    was_loaded: bool = False  # before, from these very files: they were checked to be sound
