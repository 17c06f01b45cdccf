"""HTTP/1.1 by uvicorn, with limits of time: for the head of a request, since a client that sends a byte of it now and
then would else keep its connection for ever, and for one that reads nothing. And a client that goes away is noticed
whatever else it has sent."""

from __future__ import annotations

import asyncio
import secrets

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from octavo.server.errors import ApiError, encode

_AHEAD = 1 << 16  # bytes of further requests that are taken while one is answered


class TimedProtocol(H11Protocol):
    """One connection. `head_timeout`: seconds from its beginning, or from the first byte of another request on it, to
    the end of the request's head. `write_timeout`: seconds in which a client reads nothing of what waits to be sent."""

    head_timeout = 60.0
    write_timeout = 120.0

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None  # looks whether the client does
    _unread = 0  # bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type] # uvicorn narrows it
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._reads_again()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has a head that is too long, is answered in the one envelope too."""
        del msg
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun, which breaks off
            most = self.config.h11_max_incomplete_event_size or 0
            if len(self.conn.trailing_data[0]) > most:
                error = ApiError(431, f"path and headers may have at most {most} bytes")
            else:
                error = ApiError(400, "this is no request of HTTP/1.1")
            body = encode(error.body)
            headers = {
                b"content-type": b"application/json",
                b"content-length": str(len(body)).encode(),
                b"connection": b"close",
                b"x-request-id": secrets.token_hex(16).encode(),
            }
            reason = STATUS_PHRASES[error.status]
            head = h11.Response(status_code=error.status, headers=[*headers.items()], reason=reason)
            parts = [self.conn.send(one) or b"" for one in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(parts))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads_again()

    def _look_later(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self.write_timeout, self._look)

    def _look(self) -> None:
        """The kernel ends a TCP connection whose other end takes nothing, but no Unix socket."""
        if self.transport.get_write_buffer_size() >= self._unread:
            self.transport.abort()
        else:
            self._look_later()

    def _reads_again(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        if self._is_answering:
            self._forget()
            if self.flow.read_paused and not self.cycle.more_body and len(self.conn.trailing_data[0]) < _AHEAD:
                # Another request has come early, so reading was paused; but only who reads notices that a client goes.
                self.flow.resume_reading()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout, self._too_late)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if not self._is_answering:
            self.timeout_keep_alive_handler()
