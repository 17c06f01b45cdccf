"""The folder of `block_files`: its own files alone, whatever else lies there, and a limit that all its users keep.

It touches only names of its own form, follows no links, and reads regular files of the expected size only. A folder
that others could write to is refused. The bytes in use stand in a small file that is locked while somebody adds or
removes blocks, so that several processes share one limit; they are counted anew when it seems to be reached, and after
anything unexpected.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.core.errors import ConfigError

_BLOCK = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.kv")
_UNFINISHED = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.[0-9]+\.tmp")
_USAGE = "octavo-kv.usage"
_LOCK_SECONDS = 10.0  # it is held for milliseconds; a stopped process may hold it for ever
_LEFT_OVER_SECONDS = 60  # an unfinished file that is older is of a program that ended while it wrote
_SLACK = 32  # this part of the limit is freed at once when it is reached: counting a large folder takes a while


class BlockFolder:
    """Raises ConfigError if the folder cannot be used. The other methods raise OSError where they say so."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._last_time = 0
        self._patience = _LOCK_SECONDS  # none after it was in vain, until the lock is free again
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"kv_offload_dir: {path} cannot be used: {problem}") from None
        self._check_owner(path)
        try:
            with self._locked() as usage:
                usage.total = self._make_room(0)
        except OSError as error:
            raise ConfigError(f"kv_offload_dir: {path} cannot be used: {error.strerror}") from None

    def _check_owner(self, path: Path) -> None:
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid():
            raise ConfigError(f"kv_offload_dir: {path} belongs to another user; give a folder of your own")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(found.st_mode)
            raise ConfigError(
                f"kv_offload_dir: {path} can be written by others (mode {mode:o}): what is in it is trusted, so it "
                "must be its owner's alone (chmod go-w)"
            )

    def __del__(self) -> None:
        # Not before: a thread that still reads must not meet another file under this number.
        if hasattr(self, "_fd"):
            with suppress(OSError):
                os.close(self._fd)

    # --- what is there ---

    def names(self, prefix: str) -> list[str]:
        """Blocks whose names begin so, the one used longest ago first."""
        return [name for _, name, _ in self._scan() if name.startswith(prefix + "-")]

    def num_bytes(self) -> int:
        return sum(size for _, _, size in self._scan())

    def read(self, name: str, size: int) -> bytes | None:
        """The whole of a regular file of exactly this size; None if there is no such file. Raises OSError if it cannot
        be read now."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return None
            raise
        with os.fdopen(fd, "rb", buffering=0) as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return None
            parts = []
            left = size
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        return b"".join(parts) if not left else None

    # --- changing it ---

    def write(self, name: str, *parts: bytes) -> list[str]:
        """Put a block there, whole or not at all; the names of those that were removed for it. Raises OSError."""
        size = sum(map(len, parts))
        removed: list[str] = []
        with self._locked() as usage:
            if usage.total is None or usage.total + size > self._max_bytes:
                usage.total = self._make_room(size, removed)
            unfinished = f"{name.removesuffix('.kv')}.{os.getpid()}.tmp"
            with suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=self._fd)  # of a program that had our process id, or a link
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(unfinished, flags, 0o600, dir_fd=self._fd)
            try:
                with os.fdopen(fd, "wb") as file:
                    for part in parts:
                        file.write(part)
                before = self._size_of(name)
                os.rename(unfinished, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except OSError:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=self._fd)
                raise
            usage.total = usage.total + size - before if before in (0, size) else None
        self.touch(name)
        return removed

    def touch(self, name: str) -> bool:
        """It is the one used last. Whether it is there."""
        with self._lock:
            # Two files are never of the same moment, though clocks may go back, and those of file systems are coarse.
            now = self._last_time = max(time.time_ns(), self._last_time + 1)
        try:
            os.utime(name, ns=(now, now), dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Raises OSError."""
        with self._locked() as usage:
            self._unlink(name)
            usage.total = None  # it was damaged: what it counted for is not known

    def remove_all(self, prefix: str) -> None:
        """Raises OSError."""
        with self._locked() as usage:
            usage.total = 0
            for _, name, size in self._scan():
                usage.total += 0 if name.startswith(prefix + "-") and self._unlink(name) else size

    # --- while it is locked ---

    def _make_room(self, size: int, removed: list[str] | None = None) -> int:
        """Count anew, and remove what was used longest ago until `size` more bytes fit; the bytes then in use."""
        found = self._scan(clean=True)
        total = sum(one for _, _, one in found)
        if total + size > self._max_bytes:
            slack = self._max_bytes // _SLACK // max(size, 1) * size
            for _, name, one in found:
                if total + size + slack <= self._max_bytes:
                    break
                self._unlink(name)
                total -= one
                if removed is not None:
                    removed.append(name)
        return total

    def _scan(self, clean: bool = False) -> list[tuple[int, str, int]]:
        """(time of last use, name, size) of all blocks, used longest ago first."""
        found = []
        for name in os.listdir(self._fd):  # noqa: PTH208 # by the open folder, not by its path
            with suppress(FileNotFoundError):  # another engine may have removed it
                if _BLOCK.fullmatch(name):
                    status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        on_disk = min(status.st_size, 512 * status.st_blocks)  # one that was grown has holes
                        found.append((status.st_mtime_ns, name, on_disk))
                elif clean and _UNFINISHED.fullmatch(name):
                    status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                    if time.time() - status.st_mtime > _LEFT_OVER_SECONDS:
                        os.unlink(name, dir_fd=self._fd)
        return sorted(found)

    def _size_of(self, name: str) -> int:
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def _unlink(self, name: str) -> int:
        """The size of what was removed."""
        size = self._size_of(name)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)
        return size

    @contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """Nobody else, in this process or another, changes the folder meanwhile."""
        with self._lock:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(_USAGE, flags, 0o600, dir_fd=self._fd)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                    raise OSError(errno.EPERM, f"{_USAGE} in it is a link or no regular file; remove it")
                patience, self._patience = self._patience, 0.0
                _lock(fd, patience)
                self._patience = _LOCK_SECONDS
                usage = _Usage(os.pread(fd, 32, 0))
                yield usage
                if usage.total is None or usage.total < 0:
                    os.ftruncate(fd, 0)
                else:
                    os.pwrite(fd, b"%020d\n" % usage.total, 0)
            finally:
                # Closing is not enough: a process that was forked meanwhile has the file open as well.
                fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)


def _lock(fd: int, patience: float) -> None:
    """Raises TimeoutError when somebody else does not let go of it for so many seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"another program keeps {_USAGE} in it locked") from None
            time.sleep(0.002)


class _Usage:
    """Bytes of all blocks; None: not known, to be counted."""

    def __init__(self, stored: bytes) -> None:
        self.total: int | None = int(stored) if re.fullmatch(rb"[0-9]{20}\n", stored) else None
