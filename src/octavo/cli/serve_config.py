"""What `octavo serve` is told, by flags, variables and a file, in this order of strength."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from octavo.cli.setting_args import given_flags
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, shown
from octavo.core.settings import Given, from_environment, made, type_hints, variable
from octavo.server.settings import Limits, ServerSettings

log = logging.getLogger(__name__)

KINDS = (ServerSettings, EngineConfig)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    settings: ServerSettings
    engine: EngineConfig
    sources: dict[str, str]  # of each setting that is not at its default


def kinds_of_settings() -> dict[str, type]:
    """The class of each setting, by its name."""
    return {one.name: kind for kind in KINDS for one in fields(kind)}


def serve_config(args: argparse.Namespace, environ: Mapping[str, str]) -> ServeConfig:
    """Raises ConfigError naming the flag, variable or line of a file at fault."""
    environ = _without_service_links(environ)
    path = args.config if args.config is not None else environ.get(variable("config")) or None
    of_file: dict[str, Given] = {}
    if path is not None:
        from octavo.cli.config_file import read_config_file

        of_file = read_config_file(path, kinds_of_settings())
    of_server = _strongest(ServerSettings, args, environ, of_file)
    of_engine = _strongest(EngineConfig, args, environ, of_file)
    _check_place(of_server)
    engine = made(EngineConfig, of_engine)
    _check_effect(engine, of_engine)
    sources = {name: one.source for name, one in {**of_server, **of_engine}.items()}
    return ServeConfig(made(ServerSettings, of_server), engine, sources)


def _strongest(
    kind: type, args: argparse.Namespace, environ: Mapping[str, str], of_file: Mapping[str, Given]
) -> dict[str, Given]:
    sources = given_flags(args, kind), from_environment(kind, environ), of_file
    return {one.name: joined for one in fields(kind) if (joined := _joined(one, kind, sources)) is not None}


def _without_service_links(environ: Mapping[str, str]) -> dict[str, str]:
    """Kubernetes sets OCTAVO_PORT=tcp://… in every container where there is a service called octavo."""
    name = variable("port")
    if environ.get(name, "").startswith("tcp://"):
        log.warning("%s: %s is Kubernetes' word for a service, and has no effect", name, shown(environ[name]))
        return {other: text for other, text in environ.items() if other != name}
    return dict(environ)


def _joined(one: Any, kind: type, sources: tuple[Mapping[str, Given], ...]) -> Given | None:
    """Of one setting, strongest source first. Keys add up, since one that is known should not stop working because
    another was given; and limits do, each of which is a setting of its own."""
    found = [given[one.name] for given in sources if one.name in given]
    if not found:
        return None
    told = ", ".join(given.source for given in found)
    if one.metadata.get("adds_up"):
        parts = [part for given in found for part in _listed(given.value)]
        return Given(tuple(parts), told)
    if type_hints(kind)[one.name] is Limits:
        values: dict[str, Any] = {}
        for given in reversed(found):
            Limits.of(given.source, given.value)  # while it is known who said it
            values |= given.value
        return Given(values, told)
    return found[0]


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_place(given: Mapping[str, Given]) -> None:
    for name in ("host", "port"):
        if "uds" in given and name in given:
            raise ConfigError(f"{given['uds'].source}: is instead of host and port; {given[name].source} is given, too")


def _check_effect(engine: EngineConfig, given: Mapping[str, Given]) -> None:
    # A variable may be meant for other commands as well.
    meant = [name for name, one in given.items() if one.source != variable(name)]
    for name in engine.without_effect(meant):
        raise ConfigError(f"{given[name].source}: has no effect with the {engine.backend} backend")


def effective(config: ServeConfig) -> str:
    """All settings as a file for --config, with where each is from, but for keys."""
    from octavo.cli.config_file import written

    values = {**asdict(config.engine), **asdict(config.settings)}
    left_out = {"api_key", *(("host", "port") if config.settings.uds is not None else ())}
    told = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in left_out
    }
    return written(told, config.sources, {"api_key": len(config.settings.api_key)})
