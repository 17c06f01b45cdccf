"""Embeddings as values: what a user asks, the request, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.namespace import Namespace
from octavo.core.outputs import RequestMetrics
from octavo.core.params import integer
from octavo.core.values import exact_bool, exact_str

POOLINGS = ("mean", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How a text becomes one vector: from the model's hidden states after its final norm. Names are vLLM's.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it.

    Attributes:
        pooling: "mean" of all tokens' states, or that of the "last" token.
        normalize: to length 1, so that a dot product is the cosine.
        dimensions: keep so many of the first numbers, for models that are trained for it (Kusupati et al., 2022); None:
            all.
    """

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        pooling = exact_str("pooling", self.pooling)
        if pooling not in POOLINGS:
            raise InvalidRequestError("pooling", f"must be 'mean' or 'last', not {shown(pooling)}")
        object.__setattr__(self, "pooling", pooling)
        object.__setattr__(self, "normalize", exact_bool("normalize", self.normalize))
        if self.dimensions is not None:
            object.__setattr__(self, "dimensions", integer("dimensions", self.dimensions, 1, 2**31 - 1))


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """Pool the hidden states of a prompt."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # at least one, all inside the vocabulary
    params: PoolingParams
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0  # seconds, on the engine's clock

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.cache_salt)


@dataclass(slots=True)
class PoolingOutput:
    """What comes from the engine, once."""

    request_id: str
    embedding: list[float]  # not normalised, all dimensions; empty where there is an error
    finished: bool = True
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))


def pooled(embedding: list[float], params: PoolingParams) -> list[float]:
    """What the user asked of a vector: its first numbers, and length 1. A vector of zeros stays one."""
    kept = embedding if params.dimensions is None else embedding[: params.dimensions]
    length = sum(value * value for value in kept) ** 0.5
    return [value / length for value in kept] if params.normalize and length else kept


def checked_dimensions(params: PoolingParams, hidden_size: int | None) -> None:
    """Raises InvalidRequestError."""
    if hidden_size is not None and params.dimensions is not None and params.dimensions > hidden_size:
        raise InvalidRequestError("dimensions", f"must be at most {hidden_size}, this model's, not {params.dimensions}")
