"""Files that commands read: documents, and prompts of a user's own."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from octavo.core.errors import InvalidRequestError
from octavo.core.prompts import prompts_of

MAX_FILE_BYTES = 64 << 20
Prompts = TypeVar("Prompts")


def read_text(name: str, field: str) -> str:
    """A text in UTF-8. Raises InvalidRequestError."""
    path = Path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(field, f"{name!r} cannot be read: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequestError(field, f"{name!r} holds more than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(field, f"{name!r} is not text in UTF-8: see byte {error.start}") from None


def prompts_given(args: argparse.Namespace, kind: type[Prompts]) -> Prompts:
    """From --prompts, a JSON file, and --system. Raises InvalidRequestError."""
    prompts: Any = kind()
    if args.prompts is not None:
        import json

        try:
            given = json.loads(read_text(args.prompts, "--prompts"))
        except ValueError as error:
            raise InvalidRequestError("--prompts", f"{args.prompts} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise InvalidRequestError("--prompts", "must hold a JSON object")
        prompts = prompts_of("prompts", given, kind)
    if args.system is not None:
        from octavo.cli.answering import check_system

        check_system(args.system, raw=args.raw)
        prompts = replace(prompts, system=args.system)
    return prompts
