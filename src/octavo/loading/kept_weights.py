"""Packed weights in files, so that the next start reads them as they are to lie in memory instead of packing them.

One file holds all weights of a model, and is named by a hash of what they depend on: the model's files (names, sizes,
inodes, times, samples of what is in them), Octavo's version and compiled code, and how the backend packs. It repeats
that hash and has a checksum; a file that differs in any part is not used. Files appear under their name when they are
whole, together they stay below a limit, and those used longest ago go first. Whatever goes wrong with them is logged,
and weights are packed as if they were not there.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np

from octavo.ops.packing import PackedBytes

log = logging.getLogger(__name__)

_MAGIC = b"OCTAVOWT"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ32s")  # magic, version, unused, bytes of weights, their checksum, key
_BEGIN = 4096  # where the weights do
_NAME = re.compile(r"[0-9a-f]{32}\.weights")
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.[0-9]+\.tmp")
LEAST_BYTES = 32 << 20  # of a model that is worth a file: packing less takes a moment
_WAITED_FOR = 512 << 20  # bytes whose writing is waited for when the interpreter ends
_UNUSED_SECONDS = 30 * 24 * 3600  # a file that nobody read for so long goes: its model or Octavo is another one now
_LEFT_OVER_SECONDS = 3600  # an unfinished file that is older is of a program that ended while it wrote


class KeptWeights:
    """One model's file.

    Args:
        folder: made, for its owner alone, when something is written.
        max_bytes: of all files in it.
        identity: all that the bytes depend on.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: str, packed: PackedBytes) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._packed = packed
        self._key = hashlib.sha256(identity.encode()).digest()
        self._path = folder / f"{self._key.hex()[:32]}.weights"
        self._stop = np.zeros(1, np.uint8)
        self.found: int | None = None  # the open file that `find` found

    def find(self) -> bool:
        """Whether there is a file for these weights; it stays open until `close`."""
        nbytes = self._packed.nbytes
        if nbytes < LEAST_BYTES:
            return False
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        self.found = fd
        try:
            status = os.fstat(fd)
            sound = stat.S_ISREG(status.st_mode) and status.st_size == _BEGIN + nbytes
            # What others could write is not trusted: weights decide what is answered.
            sound = sound and status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            header = os.pread(fd, _HEADER.size, 0) if sound else b""
            if len(header) == _HEADER.size:
                magic, version, _, size, self._checksum, key = _HEADER.unpack(header)
                if (magic, version, size, key) == (_MAGIC, _VERSION, nbytes, self._key):
                    return True
        except OSError as error:
            log.info("kept weights: %s", error)
        self.close()
        return False

    def read(self) -> bool:
        """Into memory what `find` found. False: it is damaged, and nothing was read."""
        if self.found is None:
            return False
        try:
            checksum = self._packed.read(self.found, _BEGIN)
        except OSError as error:
            log.warning("kept weights: %s cannot be read (%s); weights are packed anew", self._path, error)
            return False
        if checksum != self._checksum:
            self._packed.release()
            log.warning("kept weights: %s is damaged; weights are packed anew", self._path)
            with suppress(OSError):
                self._path.unlink()
            return False
        with suppress(OSError):
            os.utime(self.found)  # used last
        log.info("weights as they were packed before, from %s", self._path)
        return True

    def close(self) -> None:
        if self.found is not None:
            os.close(self.found)
            self.found = None

    def write_beside(self) -> None:
        """`write` on a thread of its own. When the interpreter ends it is waited for, if that takes a moment; else it
        gives up."""

        def end() -> None:
            if self._packed.nbytes > _WAITED_FOR:
                self._stop[0] = 1
            writing.join()

        def write_and_forget() -> None:
            try:
                self.write()
            finally:
                atexit.unregister(end)

        writing = Thread(target=write_and_forget, name="octavo-kept-weights", daemon=True)
        atexit.register(end)
        writing.start()

    def write(self) -> None:
        """Keep packed weights, if there is room. Raises nothing but what is no fault of files."""
        import shutil  # here, since a start that finds its weights kept does without it, and what it imports

        nbytes = self._packed.nbytes
        if nbytes < LEAST_BYTES or _BEGIN + nbytes > self._max_bytes:
            return
        # Nobody else's, of this process or another.
        unfinished = self._path.with_name(f"{self._path.stem}.{int.from_bytes(os.urandom(8))}.tmp")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._folder.stat()
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                log.info("kept weights: %s can be written by others; nothing is kept", self._folder)
                return
            self._make_room(nbytes)
            if shutil.disk_usage(self._folder).free < 2 * nbytes:
                log.info("kept weights: the disk of %s has little room; nothing is kept", self._folder)
                return
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(unfinished, flags, 0o600)
            try:
                checksum = self._packed.write(fd, _BEGIN, self._stop)
                os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, 0, nbytes, checksum, self._key), 0)
            finally:
                os.close(fd)
            unfinished.rename(self._path)
        except OSError as error:
            log.info("kept weights: %s; nothing is kept", error)
            with suppress(OSError):
                unfinished.unlink()
        else:
            log.info("weights are kept in %s", self._path)

    def _make_room(self, nbytes: int) -> None:
        """Remove what was used longest ago, and what was left over. Other files are somebody's own."""
        files: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self._folder):
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                continue
            age = time.time() - status.st_mtime
            is_ours = bool(_NAME.fullmatch(entry.name))
            is_left_over = _UNFINISHED.fullmatch(entry.name) and age > _LEFT_OVER_SECONDS
            if is_left_over or (is_ours and age > _UNUSED_SECONDS):
                Path(entry.path).unlink(missing_ok=True)
            elif is_ours:
                files.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files) + _BEGIN + nbytes
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
