"""Names to files: where models are kept, how they are fetched, and what a name on the command line leads to."""

from __future__ import annotations

from octavo.hub.aliases import ALIASES
from octavo.hub.home import octavo_home
from octavo.hub.progress import Progress, default_progress
from octavo.hub.resolve import LocalModel, list_models, pull, resolve_model

__all__ = [
    "ALIASES",
    "LocalModel",
    "Progress",
    "default_progress",
    "list_models",
    "octavo_home",
    "pull",
    "resolve_model",
]
