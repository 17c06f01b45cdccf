"""Settings of the server, and its limits in one block. Names of flags are vLLM's where vLLM has the thing."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from octavo.config import LOG_LEVELS
from octavo.core.errors import ConfigError, shown
from octavo.core.settings import check_settings, setting

MAX_KEY = 4096  # bytes of an API key
MAX_UDS = 107  # bytes of a Unix socket's path, as Linux has it
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def _limit(default: int, what: str) -> Any:
    return setting(default, what, low=1, high=2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may hold, and what all of them together. Every one is an integer of at least 1."""

    example: ClassVar[str] = '{"max_n": 16}'

    max_body_bytes: int = _limit(32 << 20, "bytes of one request's body")
    max_buffered_bytes: int = _limit(256 << 20, "bytes of the bodies of all requests whose answer has not begun")
    max_json_depth: int = _limit(64, "depth of a body")
    max_json_values: int = _limit(1 << 21, "values of a body")
    max_prompts: int = _limit(1024, "prompts of a request")
    max_n: int = _limit(128, "outputs of one prompt")
    max_outputs: int = _limit(1024, "outputs of all prompts of a request together")
    max_stop_strings: int = _limit(16, "stop strings")
    max_bad_words: int = _limit(128, "bad words")
    max_logit_bias: int = _limit(1024, "entries of logit_bias")
    max_messages: int = _limit(4096, "messages of a conversation")
    max_tools: int = _limit(128, "tools")
    max_tool_calls: int = _limit(128, "calls of tools of one message")
    max_request_id: int = _limit(128, "characters of a request's id")
    max_header_bytes: int = _limit(64 << 10, "bytes of a request's path and headers together")
    max_sessions: int = _limit(64, "sessions that are open at a time")
    max_sessions_per_key: int = _limit(64, "of these, sessions of one API key")
    max_branches: int = _limit(256, "branches of a session")
    max_choice_tokens: int = _limit(1 << 16, "tokens of all choices that a session compares at once")
    stream_buffer: int = _limit(64, "pieces that wait for a slow reader; beyond, they are merged")

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def of(cls, name: str, given: object) -> Limits:
        """From a mapping of some of the fields. Raises ConfigError, which begins with `name`."""
        if isinstance(given, Limits):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name}: must be an object such as {cls.example}, not {shown(given)}")
        known = [one.name for one in fields(cls)]
        for part in given:
            if part not in known:
                raise ConfigError(f"{name}: {shown(part)} is not one; there are {', '.join(known)}")
        try:
            return cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Every field is checked on construction; a bad one raises ConfigError naming it."""

    host: str = setting(DEFAULT_HOST, "address to listen on", metavar="ADDRESS")
    port: int = setting(
        DEFAULT_PORT, "port to listen on; 0: any that is free, which is printed", low=0, high=65535, metavar="PORT"
    )
    uds: str | None = setting(None, "Unix socket to listen on, instead of host and port", metavar="PATH")
    root_path: str = setting("", "path under which a proxy offers the server", metavar="PATH")
    ssl_keyfile: str | None = setting(None, "file of the TLS key", metavar="FILE")
    ssl_certfile: str | None = setting(None, "file of the TLS certificate", metavar="FILE")
    api_key: tuple[str, ...] = setting(
        (), "key that clients must send", secret=True, adds_up=True, high=1 << 20, metavar="KEY"
    )
    api_key_file: str | None = setting(None, "file of further API keys, one a line", metavar="FILE")
    allowed_origins: tuple[str, ...] = setting(
        (), "origin of browsers that may call (CORS)", separator=",", metavar="ORIGIN"
    )
    served_model_name: tuple[str, ...] = setting(
        (), "name that clients may give as model; default: the model's", separator=",", metavar="NAME"
    )
    generation_config: str = setting(
        "auto",
        "sampling where a request says nothing: as the model's files recommend (auto), or neutral (vllm)",
        choices=("auto", "vllm"),
    )
    max_num_queued_reqs: int = setting(256, "most requests that wait, beyond those that can run", low=0, high=2**31 - 1)
    max_num_queued_tokens: int | None = setting(
        None,
        "most prompt tokens that wait, beyond what KV memory holds; default: 64 contexts",
        low=1,
        high=2**63 - 1,
    )
    max_concurrent_per_key: int | None = setting(None, "most requests of one API key at a time", low=1, high=2**63 - 1)
    request_timeout: float | None = setting(None, "seconds in which a request must be answered", above=0)
    body_timeout: float = setting(60.0, "seconds in which a request's head, and then its body, must arrive", above=0)
    write_timeout: float = setting(120.0, "seconds after which a client that reads nothing is given up", above=0)
    shutdown_timeout: float = setting(30.0, "seconds that requests may go on for after SIGTERM", low=0)
    sse_keep_alive_interval: float = setting(
        15.0, "seconds between comments in a stream that has nothing to say", above=0
    )
    max_session_lease: float = setting(
        3600.0, "seconds, at most, that a session may ask to stay open while nobody uses it", above=0
    )
    hang_timeout: float = setting(
        60.0,
        "seconds without a step, or a sign of life, after which the engine's process is started again",
        above=0,
    )
    limits: Limits = field(
        default_factory=Limits,
        metadata={"help": "limits of requests, as JSON: '{\"max_n\": 16}'; see docs/server.md", "metavar": "JSON"},
    )
    log_format: str = setting("text", "lines for people, or an object of JSON a line", choices=("text", "json"))
    log_level: str = setting(
        "info", "least important lines that are told; info has one for each request", choices=LOG_LEVELS
    )
    enable_log_requests: bool = setting(False, "tell prompts and parameters of requests, too")
    max_log_len: int | None = setting(
        None, "most characters of a prompt in a line; default: all", low=0, high=2**31 - 1
    )
    otlp_traces_endpoint: str | None = setting(
        None, "URL to which OpenTelemetry's traces are sent (OTLP over HTTP), with its path", metavar="URL"
    )
    vllm_metric_names: bool = setting(False, "tell metrics by vLLM's names as well")
    enable_tokenizer_info_endpoint: bool = setting(False, "offer /tokenizer_info, which tells the chat template")
    enable_debug_routes: bool = setting(False, "offer /server_info and /debug/timeline")

    def __post_init__(self) -> None:
        if isinstance(self.log_level, str):
            object.__setattr__(self, "log_level", self.log_level.lower())
        check_settings(self)
        if not self.host:
            raise ConfigError("host: is empty; 0.0.0.0 listens on all addresses")
        self._check_keys()
        self._check_paths()
        if self.max_log_len is not None and not self.enable_log_requests:
            raise ConfigError("max_log_len: has no effect without enable_log_requests")
        if self.otlp_traces_endpoint is not None:
            _check_url("otlp_traces_endpoint", self.otlp_traces_endpoint)

    def _check_keys(self) -> None:
        if self.api_key_file is not None:
            keys = dict.fromkeys([*self.api_key, *read_keys(self.api_key_file)])
            object.__setattr__(self, "api_key", tuple(keys))
        for key in self.api_key:
            if not key.isascii() or not key.isprintable() or " " in key or len(key) > MAX_KEY:
                raise ConfigError(f"api_key: must be at most {MAX_KEY} visible ASCII characters")
        if self.max_concurrent_per_key is not None and not self.api_key:
            raise ConfigError("max_concurrent_per_key: has no effect without api_key")

    def _check_paths(self) -> None:
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path: must begin with /, not {shown(self.root_path)}")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        for name, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
            path = getattr(self, name)
            if path is None:
                continue
            if not path or not Path(path).is_file():
                raise ConfigError(f"{name}: {shown(path)} is no file")
            if getattr(self, other) is None:
                raise ConfigError(f"{name}: needs {other}")
        if self.uds is None:
            return
        if not self.uds or "\0" in self.uds or len(self.uds.encode(errors="surrogateescape")) > MAX_UDS:
            raise ConfigError(f"uds: must be a path of at most {MAX_UDS} bytes, not {shown(self.uds)}")
        for name, default in (("host", DEFAULT_HOST), ("port", DEFAULT_PORT)):
            if getattr(self, name) != default:
                raise ConfigError(f"uds: is instead of {name}, and not beside it")


def _check_url(name: str, url: str) -> None:
    if "@" in url:
        raise ConfigError(f"{name}: must hold no password; OTEL_EXPORTER_OTLP_HEADERS is for what must be sent")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ConfigError(f"{name}: must be a URL such as http://127.0.0.1:4318/v1/traces, not {shown(url)}")


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
