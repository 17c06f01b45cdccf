"""Speculative decoding as users set it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from octavo.core.errors import ConfigError, InvalidRequestError, shown
from octavo.core.settings import check_settings, setting

METHODS = ("ngram", "suffix", "draft_model", "draft_head")
MAX_SPECULATIVE_TOKENS = 64
_DEFAULT_TOKENS = {"ngram": 8, "suffix": 16, "draft_model": 4, "draft_head": 4}
_WHAT_MODEL = {
    "draft_model": "a small model with the same vocabulary",
    "draft_head": "the .safetensors file of a head that was trained for this model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed. Names are vLLM's where vLLM has the thing; `adaptive`, `max_branches` and
    `max_cached_tokens` are ours.

    Every field is checked on construction; a bad one raises ConfigError naming it.
    """

    example: ClassVar[str] = '{"method": "suffix"}'

    method: str = setting("suffix", "what guesses", choices=METHODS)
    model: str | None = setting(
        None,
        "of draft_model: a small model with the same vocabulary, named as models are; of draft_head: a file",
        metavar="MODEL",
    )
    num_speculative_tokens: int | None = setting(
        None, "most tokens that are guessed at once", low=1, high=MAX_SPECULATIVE_TOKENS
    )
    adaptive: bool = setting(
        True, "guess as many tokens as are predicted to pay, or none; else always num_speculative_tokens"
    )
    prompt_lookup_max: int | None = setting(None, "of ngram: most tokens that are looked up", low=1, high=1024)
    prompt_lookup_min: int | None = setting(None, "of ngram: fewest tokens that are looked up", low=1, high=1024)
    suffix_decoding_min_token_prob: float = setting(
        0.1, "of suffix: a token is guessed if so many of the continuations seen have it", low=0.0, high=1.0
    )
    suffix_decoding_max_cached_requests: int = setting(
        0,
        "of suffix: most finished outputs in which is looked too, of requests with the same cache_salt; 0: none",
        low=0,
        high=1 << 20,
    )
    max_branches: int = setting(
        3, "of suffix: most tokens that are guessed to follow the same one; 1: no trees", low=1, high=16
    )
    max_cached_tokens: int = setting(
        1 << 20, "of suffix: most tokens of these outputs, at 100 to 200 bytes each", low=1, high=1 << 26
    )

    def __post_init__(self) -> None:
        check_settings(self)
        least, most = self.lookup
        if least > most:
            raise ConfigError(f"prompt_lookup_min: {least} is more than prompt_lookup_max={most}")
        if self.method in _WHAT_MODEL and not self.model:
            raise ConfigError(f"model: is missing; method={self.method!r} needs {_WHAT_MODEL[self.method]}")
        for name in self._of_other_methods():
            raise ConfigError(f"{name}: has no effect with method={self.method!r}")

    def _of_other_methods(self) -> list[str]:
        """Settings that were given and that this method does not have."""
        owners: dict[str, tuple[str, ...]] = {"prompt_lookup_max": ("ngram",), "prompt_lookup_min": ("ngram",)}
        owners |= {"model": tuple(_WHAT_MODEL)} | dict.fromkeys(("max_branches", "max_cached_tokens"), ("suffix",))
        defaults = {one.name: one.default for one in fields(self)}
        owners |= {name: ("suffix",) for name in defaults if name.startswith("suffix_")}
        return [name for name, of in owners.items() if self.method not in of and getattr(self, name) != defaults[name]]

    @property
    def lookup(self) -> tuple[int, int]:
        """Fewest and most tokens that ngram looks up: one bound alone is both, as in vLLM; else 2 to 5."""
        least, most = self.prompt_lookup_min, self.prompt_lookup_max
        if least is None and most is None:
            return 2, 5
        return (most if least is None else least) or 1, (least if most is None else most) or 1

    @property
    def max_drafts(self) -> int:
        """num_speculative_tokens, resolved."""
        return self.num_speculative_tokens or _DEFAULT_TOKENS[self.method]

    @classmethod
    def of(cls, name: str, given: object) -> SpeculativeConfig:
        """From a mapping of some of the fields. Raises ConfigError, which begins with `name`."""
        from octavo.core.values import exact_fields, exact_record, is_a

        try:
            if is_a(given, SpeculativeConfig):
                return exact_record(name, given, SpeculativeConfig)
            found = exact_fields(name, given, f"must be an object such as {cls.example}")
        except InvalidRequestError as error:
            raise ConfigError(str(error)) from None
        known = [one.name for one in fields(cls)]
        for part in found:
            if part not in known:
                raise ConfigError(f"{name}: {shown(part)} is not one; there are {', '.join(known)}")
        if "method" not in found:
            raise ConfigError(f"{name}.method: is missing; it is one of {', '.join(METHODS)}")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from None
