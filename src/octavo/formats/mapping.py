"""Read-only memory mapping of a model file, and what every opened model file offers."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from octavo.core.errors import ModelFormatError, ModelNotFoundError
from octavo.formats.tensor import RawTensor


def map_file(path: Path) -> mmap.mmap:
    """Map a whole regular file, read-only.

    The mapping's pages are the file's: replace a model file by renaming a new one over it; a file that is truncated in
    place while mapped makes the operating system end the process (SIGBUS), here as in every memory-mapped reader.

    Raises ModelNotFoundError if there is nothing at `path`, ModelFormatError if it is empty, no regular file, or cannot
    be read.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFormatError(path, "file", f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # an embedded null byte
        raise ModelNotFoundError(f"{str(path)!r}: {error}") from None
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFormatError(path, "file", "is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(path, "file", "is not a regular file")
        if status.st_size == 0:
            raise ModelFormatError(path, "file", "is empty")
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(path, "file", f"cannot be mapped: {error}") from None
    finally:
        os.close(fd)


class ModelFile:
    """An opened model file: `path`, `metadata`, `tensors`; a context manager.

    `close` drops the object's own references. A tensor or array taken out before stays valid, and the mapping lives
    until the last of them is gone.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: dict[str, RawTensor], mappings: Sequence[mmap.mmap]
    ) -> None:
        self.path = path
        self.mappings = mappings
        self._metadata: Mapping[str, Any] | None = MappingProxyType(metadata)
        self._tensors: dict[str, RawTensor] | None = tensors

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key -> value, read-only, in the order of the file."""
        if self._metadata is None:
            raise ValueError(f"{self.path} is closed")
        return self._metadata

    @property
    def tensors(self) -> dict[str, RawTensor]:
        """Name -> tensor, in the order of the file."""
        if self._tensors is None:
            raise ValueError(f"{self.path} is closed")
        return self._tensors

    def drop_pages(self) -> None:
        """Have the system forget what was read so far: it takes that out of the process, for which closing the file
        would else have to wait. What is read again is there again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file; allowed more than once."""
        self.mappings = ()
        self._metadata = None
        self._tensors = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def printable(name: str) -> str:
    """A name from a file, fit for an error message: ASCII on one line, 1 to 100 characters."""
    if not name:
        return "''"
    text = ascii(name[:100])[1:-1]
    return text if len(text) <= 100 and len(name) <= 100 else text[:97] + "..."
