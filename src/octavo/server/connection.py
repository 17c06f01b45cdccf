"""One end of the socket between the server's two processes: messages, each with its length before it."""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from octavo.server.wire import dumps, loads

log = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 1 << 28
_READ = 1 << 18  # bytes at a time
_MOST_WAITING = 1 << 14  # messages
_LENGTH = struct.Struct("!I")


class ConnectionEndedError(Exception):
    """The other end is gone, or said something that is no message."""


class Connection:
    """Messages are sent by a thread of its own, so that no caller waits for the other end; `send_now` waits."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._received = bytearray()
        self._ended = False
        self._writer = threading.Thread(target=self._write, name=f"octavo-{name}", daemon=True)
        self._writer.start()

    def send(self, message: Any, refused: Callable[[Exception], None] | None = None) -> None:
        """In the order of the calls. After the end of the connection nothing is sent, and nobody is told. `refused` is
        told, on another thread, of a message that cannot be sent, which leaves the connection as it is."""
        self._waiting.put((message, refused))

    def wait_for_room(self) -> None:
        """Until not too many messages wait. For who makes more and more of them, whether or not the other end reads."""
        while self._waiting.qsize() >= _MOST_WAITING and self._writer.is_alive():
            time.sleep(0.001)

    def send_now(self, message: Any) -> None:
        """Ahead of whatever waits, and before it returns. Raises OSError."""
        data = dumps(message)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next message. Raises ConnectionEndedError."""
        try:
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise ConnectionEndedError(f"a message of {length} bytes")
            return loads(self._exactly(length))
        except (OSError, ValueError) as error:
            raise ConnectionEndedError(str(error)) from None

    def _exactly(self, size: int) -> bytes:
        """Messages come many at a time, as they are sent: there is one read for all of them."""
        while len(self._received) < size:
            part = self._socket.recv(_READ)
            if not part:
                raise ConnectionEndedError("the other end is closed")
            self._received += part
        data = bytes(memoryview(self._received)[:size])
        del self._received[:size]
        return data

    def _write(self) -> None:
        """All that waits goes in one write."""
        while True:
            messages = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(messages) < 1024:
                    messages.append(self._waiting.get_nowait())
            ends = None in messages
            parts = []
            for message, refused in messages[: messages.index(None)] if ends else messages:
                try:
                    data = dumps(message)
                    if len(data) > MAX_MESSAGE_BYTES:
                        raise ValueError(f"a message of {len(data)} bytes")
                except Exception as error:
                    log.exception("a message cannot be sent")
                    if refused is not None:
                        refused(error)
                    continue
                parts += [_LENGTH.pack(len(data)), data]
            with suppress(OSError), self._sending:
                self._socket.sendall(b"".join(parts))
            if ends:
                return

    def close(self) -> None:
        """What waits is sent before. Idempotent."""
        if not self._ended:
            self._ended = True
            self._waiting.put(None)
            if threading.current_thread() is not self._writer:
                self._writer.join(5.0)
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
