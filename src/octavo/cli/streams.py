"""stdout and stderr of the program: what cannot be written is told by name, and ends the program at most once."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from octavo.core.errors import OctavoError


class OutputError(OctavoError):
    """stdout cannot be written: a full disk, a closed descriptor."""


class _Stream(ABC):
    """A text stream but for its errors."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    @abstractmethod
    def _failed(self, error: OSError) -> None:
        """It cannot be written."""

    def _forget(self) -> None:
        """Give the stream somewhere to write: the interpreter flushes it once more when it exits."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Stdout(_Stream):
    _reader_gone: BrokenPipeError | None = None

    def flush(self) -> None:
        if self._reader_gone is not None:  # argparse keeps what it gets from `write` to itself
            raise self._reader_gone
        super().flush()

    def _failed(self, error: OSError) -> None:
        self._forget()
        if isinstance(error, BrokenPipeError):
            self._reader_gone = error
            raise error
        raise OutputError(f"stdout cannot be written: {error.strerror or error}") from None


class _Stderr(_Stream):
    """It tells people how things go; that it cannot be written changes nothing about them."""

    def write(self, text: str) -> int:
        with suppress(ValueError):  # closed: a log handler outlives the program's end
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(ValueError):
            super().flush()

    def _failed(self, error: OSError) -> None:
        self._forget()


@contextmanager
def checked_streams() -> Iterator[None]:
    """While the block runs, writing to stdout raises OutputError or BrokenPipeError, and writing to stderr nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", _Stdout(before[0] or _closed(1)))
    sys.stderr = cast("TextIO", _Stderr(before[1] or _closed(2)))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets \xe9, not an exception
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _closed(descriptor: int) -> TextIO:
    """A stream for a descriptor that the program was started without: every write fails as it would there."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)
    return open(descriptor, "w", encoding="utf-8", closefd=False)  # it lives as long as we do
