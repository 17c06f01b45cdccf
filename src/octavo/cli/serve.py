"""Serve a model over HTTP, with the routes of OpenAI's API.

MODEL is as everywhere: a short name, a Hugging Face name, a .gguf file or a folder. Any client of OpenAI's API can
use it at http://HOST:PORT/v1; for people there is a page at /. Keys come from --api-key, --api-key-file and the
variable OCTAVO_API_KEY; with a key, every route but /live and the page, which asks for it, needs one. The first SIGTERM
or Ctrl-C lets requests finish, the second ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from octavo.cli.engine_args import add_engine_arguments, engine_config, flag
from octavo.core.errors import ConfigError, shown

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.config import EngineConfig
    from octavo.server.served_llm import ServedLLM
    from octavo.server.settings import ServerSettings

EXIT_FORCED = 130
_NEEDED = "fastapi", "uvicorn", "msgspec"
_NUMBERS = {
    "port": int,
    "max_num_queued_reqs": int,
    "max_num_queued_tokens": int,
    "max_concurrent_per_key": int,
    "request_timeout": float,
    "body_timeout": float,
    "write_timeout": float,
    "shutdown_timeout": float,
    "hang_timeout": float,
    "sse_keep_alive_interval": float,
}
_LISTS = "served_model_name", "api_key", "allowed_origins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo serve`."""
    parser.usage = "octavo serve [-h] [-v] [MODEL] [flags]"
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="what to serve")
    check_packages("octavo serve")
    from octavo.server.settings import ServerSettings

    group = parser.add_argument_group("server settings")
    for setting in fields(ServerSettings):
        text = setting.metadata["help"]
        if setting.name in _LISTS:
            group.add_argument(flag(setting.name), action="append", metavar="VALUE", help=text)
        elif setting.default is False:
            group.add_argument(flag(setting.name), action="store_const", const=True, help=text)
        else:
            default = setting.default if isinstance(setting.default, str | int | float) else None
            told = f"{text} (default {default})" if default not in (None, "") else text
            group.add_argument(flag(setting.name), metavar="VALUE", help=told)
    group.add_argument("--api-key-file", metavar="FILE", help="file of API keys, one a line")
    add_engine_arguments(parser)


def check_packages(command: str) -> None:
    """Raises ConfigError if something is missing that the server needs."""
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{command} needs {', '.join(missing)}: pip install 'octavo[server]'")


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded, the port included."""
    from octavo.server.serving import check_tls, open_socket, run_server

    if args.model_argument is not None:
        if args.model is not None and args.model != args.model_argument:
            raise ConfigError(f"--model: {shown(args.model)} contradicts the argument {shown(args.model_argument)}")
        args.model = args.model_argument
    settings = server_settings(args, os.environ)
    config = engine_config(args)
    check_tls(settings)
    with open_socket(settings) as listener:
        llm = open_llm(config, settings)
        try:
            forced = run_server(llm, settings, listener, lambda url: _tell(url, llm, settings))
        finally:
            llm.close()
    return EXIT_FORCED if forced else 0


def open_llm(config: EngineConfig, settings: ServerSettings) -> ServedLLM:
    """The engine to serve, in a process of its own, and what is counted of it."""
    from octavo.hub import resolve_model
    from octavo.server.context import public_name
    from octavo.server.metrics import Metrics
    from octavo.server.served_llm import ServedLLM

    resolve_model(config.model)  # with its own progress bars, when it has to be fetched
    llm = ServedLLM(hang_seconds=settings.hang_timeout, **asdict(config))
    name = (settings.served_model_name or (public_name(config.model),))[0]
    llm.metrics = Metrics(llm.figures, name, vllm_names=settings.vllm_metric_names)
    return llm


def server_settings(args: argparse.Namespace, environ: Any) -> ServerSettings:
    """Settings from flags over the environment. Raises ConfigError."""
    from octavo.server.settings import ServerSettings, read_keys

    given: dict[str, Any] = {}
    for setting in fields(ServerSettings):
        value = getattr(args, setting.name, None)
        if value is not None:
            given[setting.name] = _value(setting.name, value)
    keys = list(given.get("api_key", ()))
    if args.api_key_file is not None:
        keys += read_keys(args.api_key_file)
    # Flags and environment add up: a key that is known should not stop working because another was given.
    if environ.get("OCTAVO_API_KEY"):
        keys.append(environ["OCTAVO_API_KEY"])
    if keys:
        given["api_key"] = tuple(keys)
    return ServerSettings(**given)


def _value(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        kind = _NUMBERS[name]
        try:
            return kind(value)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise ConfigError(f"{flag(name)}: must be {what}, not {shown(value)}") from None
    if name == "limits":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            problem = 'must be a JSON object such as {"max_n": 16}'
            raise ConfigError(f"--limits: {problem}, not {shown(value)}") from None
    return value


def _tell(url: str, llm: AsyncLLM, settings: ServerSettings) -> None:
    """Where the server is, on stdout: with --port 0 nobody else knows."""
    print(f"octavo: serving {llm.config.model} at {url}", flush=True)
    if not settings.api_key and settings.host not in ("127.0.0.1", "::1", "localhost"):
        sys.stderr.write(f"octavo: warning: everybody who reaches {settings.host} may ask: there is no --api-key\n")
