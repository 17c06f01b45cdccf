"""KV blocks that left memory, in a folder of limited size: found again by later requests and after a restart.

A block is named by a hash of everything it depends on: model and settings (the numeric fingerprint), block size, cache
salt and all tokens up to its end. The file repeats that, holds the block's own tokens and a checksum; what does not fit
in every part is no hit, and is removed. Files appear under their name when they are whole. Reading and writing happen
on threads of their own; when writing falls behind, blocks are not kept rather than waited for.

Several engines, of one process or of many, may share a folder and its limit; what others write an engine finds when it
starts. What is in it must be trusted like the
model itself: the checksum finds damage, and is no signature.
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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from octavo.core.errors import ConfigError
from octavo.runner.block_folder import BlockFolder

log = logging.getLogger(__name__)

_MAGIC = b"OCTAVOKV"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s16s")  # magic, version, number of tokens, bytes of KV, key, checksum of tokens and KV
_QUEUE = 64  # blocks waiting to be written
_READERS = 2
_TRY_AGAIN = 32  # lookups after which a tier that was slower than computing is tried again

ReadBlock = Callable[[int], bytes]


def loading_is_slower(load_seconds: float | None, compute_seconds: float | None) -> bool:
    """The decision, from what was measured of a block so far; None: nothing was."""
    return load_seconds is not None and compute_seconds is not None and load_seconds > compute_seconds


class BlockFiles:
    """See octavo.core.protocols.BlockTier.

    Args:
        folder: made if it is not there, for its owner alone. In a forked child, which has none of the threads, it holds
            nothing.
        max_bytes: of the blocks of all engines in this folder; those used longest ago go first.
        block_size: tokens in a block.
        block_bytes: of a block's K and V in all layers; a file that holds another number is no hit.
        read_block: gives these bytes.
        identity: what tells apart engines that cannot use each other's blocks.
        timer: seconds; how long reading takes decides whether it is worth it.

    Raises ConfigError if the folder cannot be used, or has no room for a block.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        block_size: int,
        block_bytes: int,
        read_block: ReadBlock,
        *,
        identity: str = "",
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._file_bytes = _HEADER.size + 4 * block_size + block_bytes
        if max_bytes < self._file_bytes:
            raise ConfigError(
                f"kv_offload_bytes: must be at least {self._file_bytes}, the size of one block, not {max_bytes}"
            )
        self._block_bytes = block_bytes
        self._max_bytes = max_bytes
        self._read_block: ReadBlock | None = read_block
        self._prefix = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._timer = timer
        self._pid = os.getpid()
        self._folder = BlockFolder(folder, max_bytes)
        self._lock = threading.Lock()  # of what follows; held for moments only
        self._known: OrderedDict[str, None] = OrderedDict.fromkeys(self._folder.names(self._prefix))
        self._generation = 0  # times that all was forgotten
        self._load_seconds: float | None = None  # of a block, a moving average
        self._refused = 0
        self._refuses = False  # whether the disk refused the last block
        self._readers: ThreadPoolExecutor | None = None
        self._pending: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._writer = threading.Thread(target=self._work, name="octavo-kv-files", daemon=True)
        self._writer.start()

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks in the folder, of all engines."""
        return self._folder.num_bytes()

    def __len__(self) -> int:
        """Blocks known to be there for this engine."""
        return len(self._known)

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    # --- what the KV cache manager asks ---

    def save(self, key: bytes, token_ids: tuple[int, ...], block: int) -> None:
        if self._is_forked or self._read_block is None:
            return
        name = self._name(key)
        with self._lock:
            if name in self._known or self._pending.qsize() >= _QUEUE:
                return
            generation = self._generation
        try:
            kv = self._read_block(block)
        except Exception:
            log.exception("kv_offload_dir: a block was not kept")
            return
        self._pending.put(lambda: self._write(name, key, token_ids, kv, generation))

    def has(self, key: bytes) -> bool:
        if self._is_forked:
            return False
        with self._lock:
            return self._name(key) in self._known

    def load(
        self, key: bytes, token_ids: tuple[int, ...], compute_seconds: float | None
    ) -> Future[bytes | None] | None:
        if self._is_forked or self._read_block is None:
            return None
        name = self._name(key)
        with self._lock:
            if name not in self._known:
                return None
            slower = loading_is_slower(self._load_seconds, compute_seconds)
            if slower and self._refused < _TRY_AGAIN:
                self._refused += 1
                return None
            self._refused = 0
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, "octavo-kv-files")
        try:
            return self._readers.submit(self._load, name, key, token_ids)
        except RuntimeError:  # no new thread: the interpreter is ending, or the system refuses
            return None

    def keep(self, blocks: Sequence[tuple[bytes, tuple[int, ...], int]]) -> None:
        if self._is_forked or self._read_block is None:
            return
        self.flush()
        for key, token_ids, block in blocks[-(self._max_bytes // self._file_bytes) :]:
            name = self._name(key)
            if name in self._known and self._folder.touch(name):  # else another engine has removed it
                continue
            try:
                kept = self._write(name, key, token_ids, self._read_block(block), self._generation)
            except Exception:
                log.exception("kv_offload_dir: a block was not kept")
                kept = False
            if not kept:
                return

    def clear(self) -> None:
        if self._is_forked:
            return
        with self._lock:
            self._generation += 1
            self._known.clear()
        self._pending.put(lambda: self._folder.remove_all(self._prefix))

    def flush(self) -> None:
        """Wait until everything given so far is written."""
        if not self._is_forked:
            self._pending.join()

    def close(self) -> None:
        """Write what waits and end the threads. Idempotent."""
        if self._is_forked:
            return
        if self._writer.is_alive():
            self._pending.put(None)
            self._writer.join()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._read_block = None  # it holds on to the engine's memory

    # --- on threads of their own ---

    def _name(self, key: bytes) -> str:
        return f"{self._prefix}-{key.hex()}.kv"

    def _work(self) -> None:
        while (work := self._pending.get()) is not None:
            try:
                work()
            except Exception:
                log.exception("kv_offload_dir")
            finally:
                del work
                self._pending.task_done()
        self._pending.task_done()

    def _write(self, name: str, key: bytes, token_ids: tuple[int, ...], kv: bytes, generation: int) -> bool:
        """Whether the block is there."""
        if generation != self._generation:
            return False
        body = struct.pack(f"<{len(token_ids)}i", *token_ids) + kv
        header = _HEADER.pack(_MAGIC, _VERSION, len(token_ids), len(kv), key, _checksum(body))
        try:
            removed = self._folder.write(name, header, body)
        except OSError as error:
            if not self._refuses:  # once, not for every block
                log.warning("kv_offload_dir: blocks are not kept: %s", error)
            self._refuses = True
            return False
        if self._refuses:
            log.warning("kv_offload_dir: blocks are kept again")
        self._refuses = False
        with self._lock:
            if generation == self._generation:  # else its removal waits in the queue
                self._known[name] = None
            for other in removed:
                self._known.pop(other, None)
        return True

    def _load(self, name: str, key: bytes, token_ids: tuple[int, ...]) -> bytes | None:
        started = self._timer()
        try:
            data = self._folder.read(name, self._file_bytes)
        except OSError as error:
            log.warning("kv_offload_dir: a block was not read: %s", error)
            return None
        kv = None if data is None else self._checked(data, key, token_ids)
        if kv is None:
            with self._lock:
                self._known.pop(name, None)
            with suppress(OSError):
                self._folder.remove(name)
            return None
        seconds = self._timer() - started
        with self._lock:
            self._load_seconds = seconds if self._load_seconds is None else 0.8 * self._load_seconds + 0.2 * seconds
        self._folder.touch(name)  # so that others, and a restart, know what was used last
        return kv

    def _checked(self, data: bytes, key: bytes, token_ids: tuple[int, ...]) -> bytes | None:
        """The KV of a file that is sound and is what was asked for, else None."""
        magic, version, num_tokens, num_bytes, stored_key, checksum = _HEADER.unpack_from(data)
        body = memoryview(data)[_HEADER.size :]
        if (magic, version, num_tokens, stored_key) != (_MAGIC, _VERSION, len(token_ids), key):
            return None
        if num_bytes != self._block_bytes or len(body) != 4 * num_tokens + num_bytes or _checksum(body) != checksum:
            return None
        if struct.unpack_from(f"<{num_tokens}i", body) != token_ids:
            return None
        return bytes(body[4 * num_tokens :])


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()
