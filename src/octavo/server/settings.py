"""Settings of the server, and its limits in one block. Names of flags are vLLM's where vLLM has the thing."""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from octavo.core.errors import ConfigError, shown

MAX_KEY = 4096  # bytes of an API key
_MAX_NAMES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may hold, and what all of them together. Every one is an integer of at least 1."""

    max_body_bytes: int = 32 << 20
    max_buffered_bytes: int = 256 << 20  # bodies of all requests whose answer has not begun
    max_json_depth: int = 64
    max_json_values: int = 1 << 21  # of one body
    max_prompts: int = 1024
    max_n: int = 128  # outputs of one prompt
    max_outputs: int = 1024  # of all prompts of a request together
    max_stop_strings: int = 16
    max_bad_words: int = 128
    max_logit_bias: int = 1024  # entries
    max_messages: int = 4096
    max_tools: int = 128
    max_tool_calls: int = 128  # of one message
    max_request_id: int = 128  # characters
    max_header_bytes: int = 64 << 10  # of a request's path and headers together
    max_sessions: int = 64  # that are open at a time
    max_branches: int = 256  # of a session
    stream_buffer: int = 64  # pieces that wait for a slow reader; beyond, they are merged

    def __post_init__(self) -> None:
        for one in fields(self):
            _integer(f"limits.{one.name}", getattr(self, one.name), 1, 2**63 - 1)

    @classmethod
    def of(cls, given: object) -> Limits:
        """From a mapping of some of the fields. Raises ConfigError."""
        if isinstance(given, Limits):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(f"limits: must be an object such as {{'max_n': 16}}, not {shown(given)}")
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"limits: {shown(name)} is not one; there are {', '.join(known)}")
        return cls(**given)


_SECONDS = (
    "request_timeout",
    "body_timeout",
    "write_timeout",
    "shutdown_timeout",
    "hang_timeout",
    "max_session_lease",
    "sse_keep_alive_interval",
)


def _setting(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - argparse's word
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Every field is checked on construction; a bad one raises ConfigError naming it."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0: any that is free, which is printed")
    served_model_name: tuple[str, ...] = _setting(
        (), "name clients may give as model, may be given several times; default: the model's"
    )
    # Not in reprs, which end in logs.
    api_key: tuple[str, ...] = field(
        default=(), repr=False, metadata={"help": "key that clients must send; may be given several times"}
    )
    allowed_origins: tuple[str, ...] = _setting(
        (), "origin of browsers that may call (CORS), may be given several times"
    )
    root_path: str = _setting("", "path under which a proxy offers the server")
    ssl_keyfile: str | None = _setting(None, "file of the TLS key")
    ssl_certfile: str | None = _setting(None, "file of the TLS certificate")
    max_num_queued_reqs: int = _setting(256, "most requests that wait, beyond those that can run")
    max_num_queued_tokens: int | None = _setting(
        None, "most prompt tokens that wait, beyond what KV memory holds; default: 64 contexts"
    )
    max_concurrent_per_key: int | None = _setting(None, "most requests of one API key at a time")
    request_timeout: float | None = _setting(None, "seconds in which a request must be answered")
    body_timeout: float = _setting(60.0, "seconds in which a request's head, and then its body, must arrive")
    write_timeout: float = _setting(120.0, "seconds after which a client that reads nothing is given up")
    shutdown_timeout: float = _setting(30.0, "seconds that requests may go on for after SIGTERM")
    sse_keep_alive_interval: float = _setting(15.0, "seconds between comments in a stream that has nothing to say")
    max_session_lease: float = _setting(
        3600.0, "seconds, at most, that a session may ask to stay open while nobody uses it"
    )
    generation_config: str = _setting(
        "auto", "sampling where a request says nothing: as the model's files recommend (auto), or neutral (vllm)"
    )
    hang_timeout: float = _setting(
        60.0, "seconds without a step, or a sign of life, after which the engine's process is started again"
    )
    vllm_metric_names: bool = _setting(False, "tell metrics by vLLM's names as well")
    enable_tokenizer_info_endpoint: bool = _setting(False, "offer /tokenizer_info, which tells the chat template")
    enable_debug_routes: bool = _setting(False, "offer /server_info")
    limits: Limits = field(
        default_factory=Limits, metadata={"help": "limits of requests, as JSON: '{\"max_n\": 16}'; see docs/server.md"}
    )

    def __post_init__(self) -> None:
        _text("host", self.host)
        _integer("port", self.port, 0, 65535)
        for name in ("served_model_name", "api_key", "allowed_origins"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for key in self.api_key:
            if len(key.encode()) > MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"api_key: must be at most {MAX_KEY} visible ASCII characters")
        self._check_paths()
        _integer("max_num_queued_reqs", self.max_num_queued_reqs, 0, 2**31 - 1)
        for name in ("max_num_queued_tokens", "max_concurrent_per_key"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, 2**63 - 1)
        if self.max_concurrent_per_key is not None and not self.api_key:
            raise ConfigError("max_concurrent_per_key: has no effect without api_key")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is not None or name != "request_timeout":
                object.__setattr__(self, name, _seconds(name, value, name == "shutdown_timeout"))
        if self.generation_config not in ("auto", "vllm"):
            raise ConfigError(f"generation_config: must be auto or vllm, not {shown(self.generation_config)}")
        for name in ("enable_tokenizer_info_endpoint", "enable_debug_routes", "vllm_metric_names"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, not {shown(getattr(self, name))}")
        object.__setattr__(self, "limits", Limits.of(self.limits))

    def _check_paths(self) -> None:
        if not isinstance(self.root_path, str) or (self.root_path and not self.root_path.startswith("/")):
            raise ConfigError(f"root_path: must begin with /, not {shown(self.root_path)}")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        for name, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
            path = getattr(self, name)
            if path is None:
                continue
            if not Path(_text(name, path)).is_file():
                raise ConfigError(f"{name}: {shown(path)} is no file")
            if getattr(self, other) is None:
                raise ConfigError(f"{name}: needs {other}")


def read_keys(path: str) -> list[str]:
    """API keys from a file, one a line; empty lines and those that begin with # are none. Raises ConfigError."""
    name = "api_key_file"
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > 1 << 20:
            raise ConfigError(f"{name}: {shown(path)} is no file of at most 1 MiB")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{name}: {shown(path)} cannot be read: {why}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{name}: {shown(path)} holds no key")
    return keys


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}: must be a string, not empty, not {shown(value)}")
    return value


def _names(name: str, value: object) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise ConfigError(f"{name}: must be a string or a list of strings, not {type(value).__name__}")
    if len(listed) > _MAX_NAMES and name != "api_key":
        raise ConfigError(f"{name}: at most {_MAX_NAMES} may be given, not {len(listed)}")
    for one in listed:
        if not isinstance(one, str) or not one:
            raise ConfigError(f"{name}: must be strings, not empty")
    return tuple(dict.fromkeys(listed))


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}: must be an integer from {low} to {high}, not {shown(value)}")
    return value


def _seconds(name: str, value: object, zero: bool) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):  # type: ignore[operator] # it is a number
        raise ConfigError(f"{name}: must be a number of seconds, not {shown(value)}")
    return float(value)  # type: ignore[arg-type]
