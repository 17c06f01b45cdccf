"""Model families, a file each, written once against the ops protocol."""

from octavo.models.registry import FAMILIES, Model, WeightLoader, model_class

__all__ = ["FAMILIES", "Model", "WeightLoader", "model_class"]
