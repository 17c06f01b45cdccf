"""Files that a command writes at its end, looked at before it begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.core.errors import InvalidRequestError


def check_writable(field: str, path: Path) -> None:
    """Now and not after minutes of measuring. What is there stays, and what is not does not come to be. Raises
    InvalidRequestError naming `field`."""
    existed = os.path.lexists(path)
    with_errors_named(field, path, lambda: path.open("a").close())
    if not existed:
        path.unlink(missing_ok=True)


def with_errors_named(field: str, path: Path, write: Callable[[], Any]) -> None:
    """Raises InvalidRequestError naming `field` where `write` cannot write the file."""
    try:
        write()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(field, f"{path} cannot be written: {reason}") from None
