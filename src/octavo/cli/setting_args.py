"""Flags made from the fields of settings (octavo.core.settings)."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from octavo.core.settings import BOOLS, Given, choices_of, flag, kind_of, parsed, type_hints

SWITCH = "{true,false}"
_METAVARS = {int: "N", float: "X"}


def add_setting_arguments(
    group: argparse._ArgumentGroup,
    kind: type,
    *,
    leave_out: Collection[str] = (),
    aliases: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """One flag per setting. Values stay text here: `given_flags` reads them."""
    for one in fields(kind):
        if one.name in leave_out:
            continue
        of_type, _ = kind_of(type_hints(kind)[one.name])
        text = one.metadata["help"] + _default(of_type, one.default)
        if of_type is bool:
            _add_switch(group, one.name, text)
            continue
        group.add_argument(
            flag(one.name),
            *(aliases or {}).get(one.name, ()),
            dest=one.name,
            action="append" if of_type is tuple else "store",
            metavar=_metavar(one.metadata, of_type),
            help=text,
        )


def _add_switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    """``--x``, ``--x true``, ``--x=false`` or ``--no-x``."""
    group.add_argument(flag(name), dest=name, nargs="?", const="true", metavar=SWITCH, help=text)
    group.add_argument(flag(f"no_{name}"), dest=name, action="store_const", const="false", help=argparse.SUPPRESS)


def _metavar(limits: Mapping[str, Any], of_type: type) -> str:
    if (choices := choices_of(limits)) is not None:
        return "{" + ",".join(map(str, choices)) + "}"
    return limits.get("metavar") or _METAVARS.get(of_type, "TEXT")


def _default(of_type: type, value: object) -> str:
    """None and a block of settings tell of themselves in their help."""
    if of_type is tuple:
        return "; may be given several times"
    return "" if value in (None, "") or not isinstance(value, str | int | float) else f" (default {_shown(value)})"


def _shown(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def given_flags(args: argparse.Namespace, kind: type) -> dict[str, Given]:
    """The settings of the flags that were given. Raises ConfigError naming a flag at fault."""
    found: dict[str, Given] = {}
    for one in fields(kind):
        text = getattr(args, one.name, None)
        if text is None:
            continue
        name, hint = flag(one.name), type_hints(kind)[one.name]
        is_list = isinstance(text, list)
        found[one.name] = Given(tuple(text) if is_list else parsed(name, text, hint, one.metadata), name)
    return found


def switches_told(arguments: list[str], switches: Collection[str]) -> list[str]:
    """``--x`` alone as ``--x=true``: argparse would take the argument behind it, such as a model's name, for its value.
    One that says true or false is its value."""
    told: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return told + arguments[number:]
        following = arguments[number + 1].lower() if number + 1 < len(arguments) else ""
        alone = argument in switches and following not in BOOLS
        told.append(f"{argument}=true" if alone else argument)
    return told
