"""Answers that come in pieces, over server-sent events; and work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.errors import ApiError, as_api_error, encode
from octavo.server.json_body import ClientGoneError
from octavo.server.records import current_record

Piece = TypeVar("Piece")
Answer = TypeVar("Answer")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What the work returns; it is cancelled when the client goes away. The body must have been read. Raises
    ClientGoneError."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _ended(working, watching)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have put things in order. What they raise was told, or nobody wants to know."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


class Outbox(Generic[Piece]):
    """Between who makes pieces and who sends them: bounded, since pieces beyond `most` are merged into earlier ones.

    Memory is then that of the answer itself, however slowly it is read, and the maker never waits.
    """

    def __init__(self, most: int, merge: Callable[[Piece, Piece], Piece | None]) -> None:
        """`merge`: an earlier piece and a new one into one; None where these two do not go together."""
        self._most = most
        self._merge = merge
        self._pieces: list[Piece] = []
        self._ended = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.num_merged = 0

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the work that puts pieces here. What it raises comes to the reader behind the last piece."""
        self._task = asyncio.ensure_future(self._run(work))

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._news.set()

    def put(self, piece: Piece) -> None:
        if len(self._pieces) >= self._most:
            # From the newest back: order is kept among pieces of one kind, which is all that their readers need.
            for at in range(len(self._pieces) - 1, -1, -1):
                merged = self._merge(self._pieces[at], piece)
                if merged is not None:
                    self._pieces[at] = merged
                    self.num_merged += 1
                    return
        self._pieces.append(piece)
        self._news.set()

    async def take(self, timeout: float | None) -> list[Piece] | None:
        """All that is there; empty if nothing came in so many seconds, None behind the end. Raises what the work
        raised."""
        if not self._pieces and not self._ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
        self._news.clear()
        pieces, self._pieces = self._pieces, []
        if pieces:
            if self._ended:
                self._news.set()
            return pieces
        if self._error is not None:
            raise self._error
        return None if self._ended else []

    async def close(self) -> None:
        """End the work, wherever it is."""
        if self._task is not None:
            await _ended(self._task)


class EventStream(Response):
    """A stream of server-sent events: one write for all that is there, a comment now and then where there is nothing,
    and at the end `last`, or an error.

    Args:
        first: pieces that were taken already.
        write: pieces -> events. Of no pieces, where there is nothing to say, it may make some as well; a comment comes
            if it makes none.
        last: what comes behind all pieces.
        error: what comes instead, of an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        outbox: Outbox[Piece],
        first: list[Piece] | None,
        write: Callable[[list[Piece]], bytes],
        last: Callable[[], bytes],
        *,
        keep_alive: float,
        write_timeout: float,
        error: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Its length is not known.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._outbox: Outbox[Any] = outbox
        self._first = first
        self._write = write
        self._last = last
        self._keep_alive = keep_alive
        self._write_timeout = write_timeout
        self._error = error or (lambda found: event(found.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait([sending, watching], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(ClientGoneError):  # the connection ends with us
                    sending.result()
        finally:
            await _ended(sending, watching)
            await self._outbox.close()

    async def _send(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._write_timeout):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:  # it reads nothing
                raise ClientGoneError from None

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pieces = self._first
        try:
            while pieces is not None:
                body = self._write(pieces) or (b"" if pieces else KEEP_ALIVE)
                if body:
                    await write(body)
                pieces = await self._outbox.take(self._keep_alive)
            body = self._last()
        except ClientGoneError:
            raise
        except Exception as error:
            body = self._error(as_api_error(error))
            if (record := current_record.get()) is not None:
                record.failed = True
        await write(body, more=False)


# Characters that end a line for `str.splitlines`, by which some clients find events; others are escaped in JSON anyway.
_LINE_ENDS = [(one.encode(), f"\\u{ord(one):04x}".encode()) for one in "\x85\u2028\u2029"]


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event with a JSON value."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    body = encode(data)
    for end, escaped in _LINE_ENDS:
        body = body.replace(end, escaped)
    return head + b"data: " + body + b"\n\n"


async def first_pieces(outbox: Outbox[Piece], seconds: float) -> list[Piece] | None:
    """What comes first, in so many seconds: so that a request that is refused gets a status, and one that waits long a
    stream that is kept alive. On an error the work is ended."""
    try:
        return await outbox.take(seconds)
    except BaseException:
        await outbox.close()
        raise
