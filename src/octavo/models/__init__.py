"""Model families, a file each, written once against the ops protocol."""

from octavo.models.families import FAMILIES, family
from octavo.models.model import Model, WeightLoader, layer_states

__all__ = ["FAMILIES", "Model", "WeightLoader", "family", "layer_states"]
