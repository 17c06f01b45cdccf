"""Serve a model over HTTP, with the routes of OpenAI's API and Anthropic's.

MODEL is as everywhere: a short name, a Hugging Face name, a .gguf file or a folder. Any client of OpenAI's API can
use it at http://HOST:PORT/v1, one of Anthropic's at http://HOST:PORT; for people there is a page at /. Keys come from
--api-key, --api-key-file, the variable OCTAVO_API_KEY and the file of --config; with a key, every route but /live and
the page, which asks for it, needs one. The first SIGTERM or Ctrl-C lets requests finish, the second ends them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from octavo.cli.engine_args import add_engine_arguments, add_model_argument, take_model_argument
from octavo.cli.setting_args import add_setting_arguments
from octavo.core.errors import ConfigError, OctavoError
from octavo.core.settings import variable

if TYPE_CHECKING:
    from octavo.cli.serve_config import ServeConfig
    from octavo.config import EngineConfig
    from octavo.server.logs import LogFormat
    from octavo.server.served_llm import ServedLLM
    from octavo.server.settings import ServerSettings

log = logging.getLogger(__name__)

EXIT_REFUSED, EXIT_FORCED = 2, 130
_NEEDED = "fastapi", "uvicorn", "msgspec", "yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo serve`."""
    parser.usage = "octavo serve [-h] [-v] [MODEL] [flags]"
    add_model_argument(parser, "what to serve")
    check_packages("octavo serve")
    from octavo.server.settings import ServerSettings

    parser.add_argument(
        "--config", metavar="FILE", help=f"settings in YAML, by the names of their flags; also {variable('config')}"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show all settings, and where each is from; then end"
    )
    text = f"Each can also be set by a variable, --port by {variable('port')}, and in the file of --config."
    add_setting_arguments(parser.add_argument_group("server settings", text), ServerSettings)
    add_engine_arguments(parser)


def check_packages(command: str) -> None:
    """Raises ConfigError if something is missing that the server needs."""
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{command} needs {', '.join(missing)}: pip install 'octavo[server]'")


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded, the port included."""
    from octavo.cli.serve_config import effective, serve_config

    take_model_argument(args)
    if args.verbose:
        if args.log_level is not None:
            raise ConfigError("--log-level: is given, and so is -v, which means info, or -vv, which means debug")
        args.log_level = "info" if args.verbose == 1 else "debug"
    config = serve_config(args, os.environ)
    if args.print_config:
        sys.stdout.write(effective(config))
        return 0
    return _serve(config)


def _serve(config: ServeConfig) -> int:
    from octavo.server.logs import LogFormat, logging_to_stderr
    from octavo.server.serving import check_tls, run_server
    from octavo.server.sockets import open_socket

    settings = config.settings
    check_tls(settings)
    if settings.otlp_traces_endpoint is not None:
        from octavo.server.tracing import check_packages

        check_packages()
    form = LogFormat(settings.log_format, settings.log_level)
    with open_socket(settings) as listener, logging_to_stderr(form):
        try:
            llm = open_llm(config.engine, settings)
            try:
                forced = run_server(llm, settings, listener, partial(_tell, config.engine.model, settings, form))
            finally:
                llm.close()
        except OctavoError as error:
            if form.format == "text":
                raise
            log.error("%s", error)
            return EXIT_REFUSED
    return EXIT_FORCED if forced else 0


def open_llm(config: EngineConfig, settings: ServerSettings) -> ServedLLM:
    """The engine to serve, in a process of its own, and what is counted and told of it."""
    from octavo.hub import resolve_model
    from octavo.server.context import public_name
    from octavo.server.metrics import Metrics
    from octavo.server.records import request_teller
    from octavo.server.remote import EngineOptions
    from octavo.server.served_llm import ServedLLM

    resolve_model(config.model)  # with its own progress bars, when it has to be fetched
    options = EngineOptions(settings.log_format, settings.log_level, settings.enable_debug_routes)
    llm = ServedLLM(hang_seconds=settings.hang_timeout, options=options, **asdict(config))
    name = (settings.served_model_name or (public_name(config.model),))[0]
    llm.metrics = Metrics(llm.figures, name, vllm_names=settings.vllm_metric_names)
    if settings.enable_log_requests:
        llm.tell_request = request_teller(llm.tokenizer.decode, settings.max_log_len)
    return llm


def _tell(model: str, settings: ServerSettings, form: LogFormat, url: str) -> None:
    """Where the server is, on stdout: with --port 0 nobody else knows."""
    from octavo.server.logs import line_of

    line = f"octavo: serving {model} at {url}"
    print(line if form.format == "text" else line_of(form, "serving", model=model, url=url), flush=True)
    if not settings.api_key and settings.uds is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("everybody who reaches %s may ask: there is no --api-key", settings.host)
