"""Calls into the tokenizers library, which raises bare Exceptions, and panics that are no Exceptions at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from octavo.core.errors import OctavoError

# Of normalised text in one call: for each the library has up to 400 bytes of memory, and all in one go.
MAX_TEXT_BYTES = 1 << 23

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class LibraryError(Exception):
    """A call failed; the message says why, in the library's words."""


def called(function: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
    """What `function` returns. Raises LibraryError for whatever it raises, but for our own errors and interrupts."""
    try:
        return function(*args, **kwargs)
    except (OctavoError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error).splitlines()
        raise LibraryError(f"{type(error).__name__}: {reason[0][:200] if reason else 'no reason given'}") from None
