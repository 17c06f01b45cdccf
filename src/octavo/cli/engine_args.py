"""Flags of the engine's settings."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from octavo.cli.setting_args import add_setting_arguments, given_flags
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, shown
from octavo.core.settings import flag, variable

_ALIASES = {"model": ("-m", "-hf")}


class _RefuseRemoteCode(argparse.Action):
    def __call__(self, *_: Any) -> None:
        raise ConfigError("--trust-remote-code: not supported; code from a model directory is never run")


def add_engine_arguments(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """One flag per setting; `engine_config` reads them."""
    text = f"Each can also be set by a variable: --max-num-seqs by {variable('max_num_seqs')}."
    group = parser.add_argument_group("engine settings", text)
    add_setting_arguments(group, EngineConfig, leave_out=leave_out, aliases=_ALIASES)
    group.add_argument("--trust-remote-code", action=_RefuseRemoteCode, nargs=0, help=argparse.SUPPRESS)


def add_model_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """The model as an argument, beside the flag."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=text)


def take_model_argument(args: argparse.Namespace) -> None:
    """It is what the flag says. Raises ConfigError where both are given and differ."""
    if args.model_argument is not None:
        if args.model is not None and args.model != args.model_argument:
            raise ConfigError(f"--model: {shown(args.model)} contradicts the argument {shown(args.model_argument)}")
        args.model = args.model_argument


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Settings from flags over environment over defaults. Raises ConfigError, also for a flag without effect."""
    given = {name: one.value for name, one in given_flags(args, EngineConfig).items()}
    config = EngineConfig.resolve(given)
    for name in config.without_effect(given):
        raise ConfigError(f"{flag(name)}: has no effect with the {config.backend} backend")
    return config
