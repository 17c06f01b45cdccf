"""Engine settings: one flat set of names for keywords, flags (``--max-num-seqs``), variables (``OCTAVO_MAX_NUM_SEQS``).

Precedence: keyword or flag, then environment, then default. An unknown keyword or flag is an error. An unknown variable
is told and left alone: nobody may have meant it for us (Kubernetes sets OCTAVO_PORT for a service called octavo, and an
image may set what another version knows).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints

from octavo.core.errors import ConfigError, shown

DEFAULT_MODEL = "smollm2"
DEFAULT_KV_OFFLOAD_BYTES = 4 << 30
ENV_PREFIX = "OCTAVO_"

OTHER_VARIABLES = ("HOME", "LOG_LEVEL", "API_KEY")  # with the prefix: read elsewhere

KV_DTYPES = ("auto", "float32", "float16", "int8")
COMPUTE_DTYPES = ("auto", "float32", "float64")
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
BLOCK_SIZES = (1, 16, 32, 64)
MAX_TOKENS = 2**31 - 1
_BOOLS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}


log = logging.getLogger(__name__)


def backend_choices() -> tuple[str, ...]:
    from octavo.backends.registry import backends

    return ("auto", *(one.name for one in backends()))


def _setting(default: Any, help: str, **limits: Any) -> Any:  # noqa: A002 - argparse's word
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; None means: chosen when the engine is built, and logged."""

    model: str = _setting(
        DEFAULT_MODEL, "short name (octavo models lists them), Hugging Face name, .gguf file or folder"
    )
    backend: str = _setting("auto", "what computes", choices=backend_choices)
    instruction_set: str | None = _setting(None, "of the cpu backend", choices=INSTRUCTION_SETS)
    threads: int | None = _setting(
        None, "threads of the cpu backend; default: the physical cores it may use", low=1, high=1024
    )
    pin_threads: bool = _setting(False, "keep each worker thread of the cpu backend on one processor")
    max_model_len: int | None = _setting(None, "most tokens of prompt and output together", low=2, high=MAX_TOKENS)
    max_num_seqs: int = _setting(32, "most sequences in a step", low=1, high=4096)
    max_num_batched_tokens: int | None = _setting(None, "most tokens in a step", low=1, high=MAX_TOKENS)
    long_prefill_token_threshold: int | None = _setting(
        None, "most tokens of one sequence in a step", low=1, high=MAX_TOKENS
    )
    scheduling_policy: str = _setting("fcfs", "order of waiting requests", choices=("fcfs", "priority"))
    block_size: int = _setting(16, "tokens of a KV block", choices=BLOCK_SIZES)
    kv_cache_dtype: str = _setting("auto", "type of stored keys and values", choices=KV_DTYPES)
    kv_cache_memory_bytes: int | None = _setting(None, "memory for KV blocks", low=1, high=2**63 - 1)
    enable_prefix_caching: bool = _setting(True, "let requests use KV that earlier ones computed")
    kv_offload_dir: str | None = _setting(None, "folder of your own for KV blocks that leave memory")
    kv_offload_bytes: int = _setting(
        DEFAULT_KV_OFFLOAD_BYTES, "most bytes of blocks in that folder, of all processes", low=1, high=2**63 - 1
    )
    max_cache_overtakes: int = _setting(
        16, "how often requests with more of their prompt cached may pass a waiting one", low=0, high=MAX_TOKENS
    )
    cascade_attention: bool = _setting(True, "read KV that sequences of a step share once for all of them")
    compute_dtype: str = _setting("auto", "type of weights and activations in arithmetic", choices=COMPUTE_DTYPES)
    seed: int | None = _setting(None, "seed of requests that give none", low=0, high=2**64 - 1)
    max_logprobs: int = _setting(20, "most log-probabilities a request may ask for per token", low=0, high=MAX_TOKENS)

    def __post_init__(self) -> None:
        hints = type_hints(EngineConfig)
        for setting in fields(self):
            value = _checked(setting.name, getattr(self, setting.name), hints[setting.name], setting.metadata)
            object.__setattr__(self, setting.name, value)
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
        known = {setting.name for setting in fields(cls)}
        for name in given:
            if name not in known:
                import difflib

                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; settings are: {', '.join(sorted(known))}"
                raise ConfigError(f"{name}: unknown setting{hint}")
        warn_of_unknown_variables(environ)
        values = _from_environment(cls, os.environ if environ is None else environ)
        values.update({name: value for name, value in given.items() if value is not None})
        for name in ("model", "kv_offload_dir"):
            if issubclass(type(values.get(name)), os.PathLike):
                try:
                    values[name] = os.fspath(values[name])
                except Exception as error:
                    problem = f"reading it raised {type(error).__name__}: {shown(str(error))}"
                    raise ConfigError(f"{name}: {problem}") from None
        return cls(**values)

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


# get_type_hints compiles each annotation anew in every call.
type_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def _from_environment(cls: type[EngineConfig], environ: Mapping[str, str]) -> dict[str, Any]:
    hints = type_hints(cls)
    values: dict[str, Any] = {}
    for setting in fields(cls):
        variable = ENV_PREFIX + setting.name.upper()
        text = environ.get(variable)
        if text is not None and text != "":
            values[setting.name] = parse_setting(variable, text, hints[setting.name])
    return values


_told: set[str] = set()  # unknown variables; once is enough


def warn_of_unknown_variables(environ: Mapping[str, str] | None = None) -> None:
    """A misspelt variable would otherwise be a setting that silently stays what it was."""
    names = os.environ if environ is None else environ
    unknown = [name for name in names if name.startswith(ENV_PREFIX) and name not in _told]
    if not unknown:
        return
    known = [*(setting.name.upper() for setting in fields(EngineConfig)), *OTHER_VARIABLES]
    for name in sorted(unknown):
        bare = name.removeprefix(ENV_PREFIX)
        if bare in known:
            continue
        import difflib

        _told.add(name)
        close = difflib.get_close_matches(bare, known, n=1)
        hint = f"; did you mean {ENV_PREFIX}{close[0]}?" if close else ""
        log.warning("%s: no such variable is known, and it has no effect%s", shown(name)[1:-1], hint)


def parse_setting(name: str, text: str, hint: Any) -> Any:
    """A setting's value from text. Raises ConfigError naming it."""
    if hint in (str, str | None):
        return text
    if hint is bool:
        if text.lower() not in _BOOLS:
            raise ConfigError(f"{name}: must be true or false, not {shown(text)}")
        return _BOOLS[text.lower()]
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: must be an integer, not {shown(text)}") from None


def choices_of(limits: Mapping[str, Any]) -> Collection[Any] | None:
    """The values that a setting may have, by its metadata; None: not a choice."""
    choices = limits.get("choices")
    return choices() if callable(choices) else choices


def _checked(name: str, given: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """The value, of a subclass of its type what it holds."""
    optional = hint in (str | None, int | None)
    if given is None and optional:
        return None
    if hint is bool:
        if given is not True and given is not False:
            raise ConfigError(f"{name}: must be true or false, not {shown(given)}")
        return given
    kind = str if hint in (str, str | None) else int
    if issubclass(type(given), bool) or not issubclass(type(given), kind):  # `__class__` may say anything
        raise ConfigError(f"{name}: must be {'a string' if kind is str else 'an integer'}, not {shown(given)}")
    value = str.__str__(given) if kind is str else int.__int__(given)
    choices = choices_of(limits)
    if choices is not None and value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(map(str, choices))}, not {shown(value)}")
    if isinstance(value, str):
        return value
    if "low" in limits and value < limits["low"]:
        raise ConfigError(f"{name}: must be at least {limits['low']}, not {shown(value)}")
    if "high" in limits and value > limits["high"]:
        raise ConfigError(f"{name}: must be at most {limits['high']}, not {shown(value)}")
    return value
