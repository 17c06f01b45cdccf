"""Model families, a file each, written once against the ops protocol."""

from octavo.models.families import FAMILIES, family
from octavo.models.family import Family
from octavo.models.model import Model, WeightLoader, run_layers

__all__ = ["FAMILIES", "Family", "Model", "WeightLoader", "family", "run_layers"]
