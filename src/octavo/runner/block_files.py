"""KV blocks that left memory, in a folder of limited size: found again by later requests and after a restart.

A block is named by a hash of everything it depends on: model and settings (the numeric fingerprint), block size, cache
salt and all tokens up to its end. The file repeats that, holds the block's own tokens and a checksum; what does not fit
in every part is no hit, and is removed. Files appear under their name when they are whole. Writing happens on a thread
of its own; when it falls behind, blocks are not kept rather than waited for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from octavo.core.errors import ConfigError

log = logging.getLogger(__name__)

_MAGIC = b"OCTAVOKV"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s16s")  # magic, version, number of tokens, bytes of KV, key, checksum of tokens and KV
_SUFFIX = ".kv"
_QUEUE = 64  # blocks waiting to be written
_TRY_AGAIN = 32  # lookups after which a tier that was slower than computing is tried again


def loading_is_slower(load_seconds: float | None, compute_seconds: float | None) -> bool:
    """The decision, from what was measured of a block so far; None: nothing was."""
    return load_seconds is not None and compute_seconds is not None and load_seconds > compute_seconds


class BlockFiles:
    """See octavo.core.protocols.BlockTier.

    Args:
        folder: made if it is not there, for its owner alone. Several engines may share it. In a forked child, which has
            no thread that writes, it holds nothing.
        max_bytes: of the files found at the start and those written since; of these, those used longest ago go first.
            Each of several engines counts what it found and wrote itself.
        block_bytes: of a block's K and V in all layers; a file that holds another number is no hit.
        read_block: gives these bytes.

    Raises ConfigError if the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int, read_block: Callable[[int], bytes]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._read_block = read_block
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # by name, used longest ago first
        self._bytes = 0
        self._load_seconds: float | None = None  # of a block, a moving average
        self._refused = 0
        self._pending: queue.Queue[tuple[bytes, tuple[int, ...], bytes] | None] = queue.Queue(_QUEUE)
        self._pid = os.getpid()
        self._scan()
        self._writer = threading.Thread(target=self._write_all, name="octavo-kv-files", daemon=True)
        self._writer.start()

    def _scan(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = []
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):  # another engine may have removed it
                    if entry.name.endswith(_SUFFIX):
                        stat = entry.stat()
                        found.append((stat.st_mtime, entry.name, stat.st_size))
                    elif entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > 60:
                        Path(entry.path).unlink()  # of a program that ended while it wrote
            probe = self._folder / f"{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"kv_offload_dir: {self._folder} cannot be used: {error.strerror}") from None
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._bytes += size
        self._make_room(0)

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._sizes)

    # --- what the KV cache manager asks ---

    def save(self, key: bytes, token_ids: tuple[int, ...], block: int) -> None:
        if os.getpid() != self._pid:
            return
        name = key.hex() + _SUFFIX
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
                return
        if not self._pending.full():
            self._pending.put((key, token_ids, self._read_block(block)))

    def has(self, key: bytes) -> bool:
        with self._lock:
            return os.getpid() == self._pid and key.hex() + _SUFFIX in self._sizes

    def load(self, key: bytes, token_ids: tuple[int, ...], compute_seconds: float | None) -> bytes | None:
        if os.getpid() != self._pid:
            return None
        name = key.hex() + _SUFFIX
        with self._lock:
            if name not in self._sizes:
                return None
            slower = loading_is_slower(self._load_seconds, compute_seconds)
            if slower and self._refused < _TRY_AGAIN:
                self._refused += 1
                return None
            self._refused = 0
        started = time.perf_counter()
        kv = self._read(self._folder / name, key, token_ids)
        if kv is None:
            self._forget(name)
            return None
        seconds = time.perf_counter() - started
        with self._lock:
            self._load_seconds = seconds if self._load_seconds is None else 0.8 * self._load_seconds + 0.2 * seconds
            if name in self._sizes:
                self._sizes.move_to_end(name)
        with suppress(OSError):
            os.utime(self._folder / name)  # so that a restart knows what was used last
        return kv

    def flush(self) -> None:
        """Wait until everything given so far is written."""
        self._pending.join()

    def close(self) -> None:
        """Write what waits and end the thread. Idempotent."""
        if self._writer.is_alive():
            self._pending.put(None)
            self._writer.join()

    # --- files ---

    def _read(self, path: Path, key: bytes, token_ids: tuple[int, ...]) -> bytes | None:
        """The KV of a file that is sound and is what was asked for, else None."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) < _HEADER.size:
            return None
        magic, version, num_tokens, num_bytes, stored_key, checksum = _HEADER.unpack_from(data)
        body = memoryview(data)[_HEADER.size :]
        if (magic, version, num_tokens, stored_key) != (_MAGIC, _VERSION, len(token_ids), key):
            return None
        if num_bytes != self._block_bytes or len(body) != 4 * num_tokens + num_bytes or _checksum(body) != checksum:
            return None
        if struct.unpack_from(f"<{num_tokens}i", body) != token_ids:
            return None
        return bytes(body[4 * num_tokens :])

    def _write_all(self) -> None:
        while (item := self._pending.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                log.warning("kv_offload_dir: a block was not kept: %s", error)
            finally:
                self._pending.task_done()
        self._pending.task_done()

    def _write(self, key: bytes, token_ids: tuple[int, ...], kv: bytes) -> None:
        body = struct.pack(f"<{len(token_ids)}i", *token_ids) + kv
        header = _HEADER.pack(_MAGIC, _VERSION, len(token_ids), len(kv), key, _checksum(body))
        size = len(header) + len(body)
        name = key.hex() + _SUFFIX
        if not self._make_room(size):
            return
        path = self._folder / f"{key.hex()}.{os.getpid()}.tmp"
        try:
            with open(path, "wb", opener=_for_owner) as file:
                file.write(header)
                file.write(body)
            path.replace(self._folder / name)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._bytes += size - self._sizes.pop(name, 0)
            self._sizes[name] = size

    def _make_room(self, size: int) -> bool:
        """Remove what was used longest ago until `size` more bytes fit; False if they never will."""
        while True:
            with self._lock:
                if self._bytes + size <= self._max_bytes:
                    return True
                if not self._sizes:
                    return False
                name = next(iter(self._sizes))
            self._forget(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(name, 0)
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("kv_offload_dir: %s", error)


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
