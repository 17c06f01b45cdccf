"""The ops protocol: the few operations a model is written against, and the handles they pass around."""

from octavo.ops.batch import Batch
from octavo.ops.model_config import (
    Activation,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
)
from octavo.ops.protocol import KVSpec, Ops, StoredTensor

__all__ = [
    "Activation",
    "Batch",
    "KVSpec",
    "LayerConfig",
    "ModelConfig",
    "Ops",
    "RopeConfig",
    "RopeScaling",
    "StoredTensor",
]
