"""The folder that holds downloaded models."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.core.errors import ConfigError, DownloadError


def octavo_home(*, writable: bool = True) -> Path:
    """`$OCTAVO_HOME`, else `$XDG_CACHE_HOME/octavo`, else `~/.cache/octavo`, as an absolute path.

    With `writable` the folder is created (mode 0700) and checked for write permission; without, nothing is touched, so
    models in a read-only image can still be found.

    Raises DownloadError when the folder cannot be made or written, ConfigError when there is no home directory.
    """
    path = _home_path()
    if not writable:
        return path
    make_private_dir(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise DownloadError(f"the model folder {path} is not writable; choose another with OCTAVO_HOME")
    return path


def models_dir(*, writable: bool) -> Path:
    """The folder with one sub-folder per alias."""
    path = octavo_home(writable=writable) / "models"
    if writable:
        make_private_dir(path)
        check_own(path)
    return path


def check_own(folder: Path) -> None:
    """Files are made and removed in it: so it must be no link to somebody's folder, and nobody else may put one there.

    Raises DownloadError.
    """
    if folder.is_symlink():
        raise DownloadError(
            f"{folder} is a link, which is not followed; remove it, or set OCTAVO_HOME to where models are to lie"
        )
    found = folder.stat()
    if os.geteuid() not in (0, found.st_uid):
        raise DownloadError(f"{folder} belongs to another user; choose another folder with OCTAVO_HOME")
    if found.st_mode & stat.S_IWOTH:
        raise DownloadError(f"{folder} can be written by everybody; take that away with chmod o-w {folder}")


def make_private_dir(path: Path) -> None:
    """Create `path`, and any missing parents, for this user only (0700). Raises DownloadError naming the folder."""
    if path.exists() and not path.is_dir():
        raise DownloadError(f"the model folder {path} is not a folder; choose another with OCTAVO_HOME")
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)  # Path.mkdir(parents=True) would ignore the mode for parents.
        except OSError as error:
            raise DownloadError(
                f"cannot create the model folder {folder}: {error.strerror}; choose another with OCTAVO_HOME"
            ) from error


def _home_path() -> Path:
    try:
        chosen = os.environ.get("OCTAVO_HOME", "").strip()
        if chosen:
            return Path(chosen).expanduser().absolute()
        cache = os.environ.get("XDG_CACHE_HOME", "").strip()
        if cache and Path(cache).is_absolute():  # The XDG specification says to ignore relative paths.
            return Path(cache) / "octavo"
        return Path.home() / ".cache" / "octavo"
    except RuntimeError as error:
        raise ConfigError("there is no home directory to keep models in; set OCTAVO_HOME to a folder") from error
