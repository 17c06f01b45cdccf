"""A lock between processes, held through a file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.core.errors import DownloadError


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; `on_wait` is called once if another process has it.

    The kernel drops the lock when its holder dies, however it dies, so there are no stale locks. The file stays: if it
    were removed, two processes could hold locks on two files of the same name.

    Raises DownloadError when the file cannot be made or the file system has no locks.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise DownloadError(f"{path} is a link, which is not followed; remove it") from error
        raise DownloadError(f"cannot write in {path.parent}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise DownloadError(f"cannot lock {path}: {error.strerror}; put OCTAVO_HOME on a local disk") from error
        yield
    finally:
        # Closing is not enough: a process that was forked meanwhile has the file open as well.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
