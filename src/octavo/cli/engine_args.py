"""Flags of the engine's settings, made from the fields of EngineConfig."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from octavo.config import ENV_PREFIX, EngineConfig, choices_of, parse_setting, type_hints
from octavo.core.errors import ConfigError

_ALIASES = {"model": ("-m", "-hf")}


class _RefuseRemoteCode(argparse.Action):
    def __call__(self, *_: Any) -> None:
        raise ConfigError("--trust-remote-code: not supported; code from a model directory is never run")


def flag(name: str) -> str:
    """``max_num_seqs`` -> ``--max-num-seqs``"""
    return "--" + name.replace("_", "-")


def add_engine_arguments(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """One flag per setting. Values stay text here: `engine_config` checks them, in the words it has for keywords."""
    group = parser.add_argument_group(
        "engine settings", f"Each can also be set by a variable: --max-num-seqs by {ENV_PREFIX}MAX_NUM_SEQS."
    )
    for setting in fields(EngineConfig):
        if setting.name in leave_out:
            continue
        if isinstance(setting.default, bool):
            _add_switch(group, setting.name, setting.metadata["help"] + _default(setting.default))
            continue
        group.add_argument(
            flag(setting.name),
            *_ALIASES.get(setting.name, ()),
            dest=setting.name,
            metavar=_metavar(setting.name, choices_of(setting.metadata)),
            help=setting.metadata["help"] + _default(setting.default),
        )
    group.add_argument("--trust-remote-code", action=_RefuseRemoteCode, nargs=0, help=argparse.SUPPRESS)


def _add_switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    """``--x``, ``--x true``, ``--x=false`` or ``--no-x``."""
    group.add_argument(flag(name), dest=name, nargs="?", const="true", metavar="{true,false}", help=text)
    group.add_argument(flag(f"no_{name}"), dest=name, action="store_const", const="false", help=argparse.SUPPRESS)


def _metavar(name: str, choices: Collection[object] | None) -> str:
    if choices is not None:
        return "{" + ",".join(map(str, choices)) + "}"
    return "MODEL" if name == "model" else "N"


def _default(value: object) -> str:
    return "" if value is None else f" (default {value})"


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Settings from flags over environment over defaults. Raises ConfigError, also for a flag without effect."""
    hints = type_hints(EngineConfig)
    given = {
        setting.name: parse_setting(flag(setting.name), text, hints[setting.name])
        for setting in fields(EngineConfig)
        if (text := getattr(args, setting.name, None)) is not None
    }
    config = EngineConfig.resolve(given)
    for name in config.without_effect(given):
        raise ConfigError(f"{flag(name)}: has no effect with the {config.backend} backend")
    return config
