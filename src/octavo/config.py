"""Settings of an engine: one flat set of names (octavo.core.settings).

Precedence: keyword or flag, then environment, then default. An unknown keyword or flag is an error. An unknown variable
is told and left alone: nobody may have meant it for us (Kubernetes sets OCTAVO_PORT for a service called octavo, and an
image may set what another version knows).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from octavo.core.errors import ConfigError, shown
from octavo.core.settings import ENV_PREFIX, Given, check_settings, from_environment, made, setting
from octavo.core.speculation import SpeculativeConfig

DEFAULT_MODEL = "smollm2"
DEFAULT_KV_OFFLOAD_BYTES = 4 << 30
DEFAULT_KEPT_WEIGHTS_BYTES = 16 << 30

OTHER_VARIABLES = ("HOME", "LOG_LEVEL", "API_KEY")  # with the prefix: read elsewhere
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

KV_DTYPES = ("auto", "float32", "float16", "int8")
COMPUTE_DTYPES = ("auto", "float32", "float64")
INSTRUCTION_SETS = ("avx512", "avxvnni", "avx2", "portable")
BLOCK_SIZES = (1, 16, 32, 64)
MAX_TOKENS = 2**31 - 1


log = logging.getLogger(__name__)


def backend_choices() -> tuple[str, ...]:
    from octavo.backends.registry import backends

    return ("auto", *(one.name for one in backends()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; None means: chosen when the engine is built, and logged."""

    model: str = setting(
        DEFAULT_MODEL, "short name (octavo models lists them), Hugging Face name, .gguf file or folder", metavar="MODEL"
    )
    backend: str = setting("auto", "what computes", choices=backend_choices)
    instruction_set: str | None = setting(None, "of the cpu backend", choices=INSTRUCTION_SETS)
    threads: int | None = setting(
        None, "threads of the cpu backend; default: the physical cores it may use", low=1, high=1024
    )
    pin_threads: bool = setting(False, "keep each worker thread of the cpu backend on one processor")
    max_model_len: int | None = setting(None, "most tokens of prompt and output together", low=2, high=MAX_TOKENS)
    max_num_seqs: int = setting(32, "most sequences in a step", low=1, high=4096)
    max_num_batched_tokens: int | None = setting(None, "most tokens in a step", low=1, high=MAX_TOKENS)
    long_prefill_token_threshold: int | None = setting(
        None, "most tokens of one sequence in a step", low=1, high=MAX_TOKENS
    )
    scheduling_policy: str = setting("fcfs", "order of waiting requests", choices=("fcfs", "priority"))
    block_size: int = setting(16, "tokens of a KV block", choices=BLOCK_SIZES)
    kv_cache_dtype: str = setting(
        "auto",
        "type of stored keys and values; auto: int8 on the cpu backend, float16 there with compute_dtype=float32",
        choices=KV_DTYPES,
    )
    kv_cache_memory_bytes: int | None = setting(None, "memory for KV blocks", low=1, high=2**63 - 1)
    enable_prefix_caching: bool = setting(True, "let requests use KV that earlier ones computed")
    kv_offload_dir: str | None = setting(None, "folder of your own for KV blocks that leave memory", metavar="FOLDER")
    kv_offload_bytes: int = setting(
        DEFAULT_KV_OFFLOAD_BYTES, "most bytes of blocks in that folder, of all processes", low=1, high=2**63 - 1
    )
    kept_weights_bytes: int = setting(
        DEFAULT_KEPT_WEIGHTS_BYTES,
        "most bytes of packed weights kept in the cache folder, so that models start faster; 0: none",
        low=0,
        high=2**63 - 1,
    )
    max_cache_overtakes: int = setting(
        16, "how often requests with more of their prompt cached may pass a waiting one", low=0, high=MAX_TOKENS
    )
    cascade_attention: bool = setting(True, "read KV that sequences of a step share once for all of them")
    compute_dtype: str = setting("auto", "type of weights and activations in arithmetic", choices=COMPUTE_DTYPES)
    speculative_config: SpeculativeConfig | None = setting(  # noqa: RUF009 - a field
        None,
        'how tokens are guessed, as JSON: {"method": "suffix"}, {"method": "ngram"}, or a draft_model and its model',
        metavar="JSON",
    )
    seed: int | None = setting(None, "seed of requests that give none", low=0, high=2**64 - 1)
    max_logprobs: int = setting(20, "most log-probabilities a request may ask for per token", low=0, high=MAX_TOKENS)

    def __post_init__(self) -> None:
        check_settings(self)
        tokens = self.max_num_batched_tokens
        if tokens is not None and tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: must be at least max_num_seqs ({self.max_num_seqs}), not {tokens}: every "
                "running sequence may decode in every step"
            )
        if self.kv_offload_dir is not None and not self.enable_prefix_caching:
            raise ConfigError("kv_offload_dir: needs enable_prefix_caching")
        if self.kv_offload_dir is None and self.kv_offload_bytes != DEFAULT_KV_OFFLOAD_BYTES:
            raise ConfigError("kv_offload_bytes: needs kv_offload_dir")

    @classmethod
    def resolve(cls, given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Settings from keywords or flags (`given`) over the environment. Raises ConfigError."""
        known = {one.name for one in fields(cls)}
        for name in given:
            if name not in known:
                import difflib

                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; settings are: {', '.join(sorted(known))}"
                raise ConfigError(f"{name}: unknown setting{hint}")
        warn_of_unknown_variables(environ)
        values = from_environment(cls, os.environ if environ is None else environ)
        values.update({name: Given(_path(name, value), "") for name, value in given.items() if value is not None})
        return made(cls, values)

    def without_effect(self, given: Collection[str]) -> list[str]:
        """Those of the settings that were given which the backend that was asked for does not heed."""
        from octavo.backends.registry import backend, backends

        if self.backend == "auto":
            return []
        heeded = backend(self.backend).settings
        known = dict.fromkeys(name for one in backends() for name in one.settings)
        return [name for name in known if name in given and name not in heeded]

    @property
    def step_tokens(self) -> int:
        """max_num_batched_tokens, resolved."""
        return self.max_num_batched_tokens or max(512, self.max_num_seqs)


def _path(name: str, value: Any) -> Any:
    if name not in ("model", "kv_offload_dir") or not issubclass(type(value), os.PathLike):
        return value
    try:
        return os.fspath(value)
    except Exception as error:
        problem = f"reading it raised {type(error).__name__}: {shown(str(error))}"
        raise ConfigError(f"{name}: {problem}") from None


_told: set[str] = set()  # unknown variables; once is enough


def warn_of_unknown_variables(
    environ: Mapping[str, str] | None = None, elsewhere: Callable[[], Collection[str]] = tuple
) -> None:
    """A misspelt variable would otherwise be a setting that silently stays what it was. `elsewhere`: names of further
    settings, which somebody else reads; asked only where there is something to tell."""
    names = os.environ if environ is None else environ
    known = [*(one.name.upper() for one in fields(EngineConfig)), *OTHER_VARIABLES]
    unknown = [name for name in names if name.startswith(ENV_PREFIX) and name not in _told]
    unknown = [name for name in unknown if name.removeprefix(ENV_PREFIX) not in known]
    if not unknown:
        return
    others = [name.upper() for name in elsewhere()]
    for name in sorted(unknown):
        _told.add(name)
        bare = name.removeprefix(ENV_PREFIX)
        if bare in others:
            continue
        import difflib

        close = difflib.get_close_matches(bare, [*known, *others], n=1)
        hint = f"; did you mean {ENV_PREFIX}{close[0]}?" if close else ""
        log.warning("%s: no such variable is known, and it has no effect%s", shown(name)[1:-1], hint)
