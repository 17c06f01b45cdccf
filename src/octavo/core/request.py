"""A request as the front door hands it to the engine: a value, checked, from which a coordinator is made there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.core.namespace import Namespace
from octavo.core.want import NextLogprobs, Wanted

if TYPE_CHECKING:
    from octavo.core.beam_params import BeamSearchParams
    from octavo.core.params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """Continue a prompt: `params.n` outputs, or with `beams` a search."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # at least one, all inside the vocabulary
    params: SamplingParams  # of a search, what applies to its rows
    seed: int  # the user's, or one drawn for this request
    max_tokens: int  # resolved: prompt and output fit the model's context
    beams: BeamSearchParams | None = None
    eos_token_ids: tuple[int, ...] = ()  # empty when they are to be ignored
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of params.bad_words
    priority: int = 0
    cache_salt: str | None = None  # requests with different salts share no cached KV
    arrival_time: float = 0.0  # seconds, on the engine's clock

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.cache_salt)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output, and may not be drawn before `min_tokens`."""
        return tuple(sorted({*self.eos_token_ids, *(self.params.stop_token_ids or ())}))

    def prompt_rows(self) -> tuple[Wanted, ...]:
        """What is wanted of the rows of the prompt, besides the last."""
        top, following = self.params.prompt_logprobs, self.prompt_token_ids[1:]
        return () if top is None else (Wanted(0, len(following), NextLogprobs(following, top)),)


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """Begin a session, of which things are asked later."""

    request_id: str
    seed: int
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.cache_salt)
