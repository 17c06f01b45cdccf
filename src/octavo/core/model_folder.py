"""Files of a model folder, which may come from anybody: what they are called and where they lead is checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from octavo.core.errors import ModelFormatError, shown

# Of a small JSON file: for each of 10,000 added tokens, of which Gemma 3 has 6,400, an object of seven entries.
_MAX_BRACKETS, _MAX_COMMAS = 1 << 17, 1 << 19


def check_inside(folder: Path, name: str, field: str = "file name", below: str = "") -> Path:
    """The path of `name` in `folder`, or in its sub-folder `below`, if it is a bare name whose links stay at home.

    A link may lead only to a file in the same folder or, as the Hugging Face cache lays models out
    (``<repo>/snapshots/<revision>/…`` -> ``<repo>/blobs/<hash>``), in the blobs of the same repository. Raises
    ModelFormatError.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
        raise ModelFormatError(folder, field, f"{shown(name)} is not a bare file name")
    path = folder / below / name
    home = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    if target.parent == home / below:
        return path
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs":
            return path
    raise ModelFormatError(folder, field, f"{shown(str(Path(below, name)))} is a link that leaves the folder")


def read_file(folder: Path, name: str, most: int, below: str = "") -> bytes | None:
    """All of a regular file of at most `most` bytes; None if there is none. Raises ModelFormatError naming the file,
    also where it is a link that leaves the folder."""
    path = folder / below / name
    if not os.path.lexists(path):
        return None
    check_inside(folder, name, below=below)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO must not wait for a writer
    except (FileNotFoundError, NotADirectoryError):
        return None  # a link to nothing
    except OSError as error:
        raise ModelFormatError(path, "file", f"cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(path, "file", "is not a regular file")
        if status.st_size > most:
            raise ModelFormatError(path, "file", f"is larger than {most} bytes")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(most)
    except OSError as error:
        raise ModelFormatError(path, "file", f"cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def check_amount(folder: object, name: str, data: bytes, lists: int, objects: int, commas: int) -> None:
    """Refuse JSON text that has more of these than allowed, before it is parsed: values take up to 100 times their
    text in memory. Those inside of strings count too. Raises ModelFormatError."""
    for found, what, most in (
        (data.count(b"["), "lists", lists),
        (data.count(b"{"), "objects", objects),
        (data.count(b","), "commas", commas),
    ):
        if found > most:
            raise ModelFormatError(folder, name, f"has {found} {what}; {most} are allowed")


def read_object(folder: Path, name: str, most: int) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file. Raises ModelFormatError as `read_file` does, and
    for anything but an object."""
    data = read_file(folder, name, most)
    if data is None:
        return {}
    check_amount(folder, name, data, _MAX_BRACKETS, _MAX_BRACKETS, _MAX_COMMAS)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(folder, name, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(folder, name, f"expected a JSON object, found {type(value).__name__}")
    return value
