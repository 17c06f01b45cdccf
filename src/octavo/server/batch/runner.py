"""A batch on its way: many requests at once, as many as keep the engine busy, and each line written as it is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec
from fastapi import FastAPI

from octavo.server.batch.answers import BatchAnswer, BatchError, BatchResponse, Output
from octavo.server.batch.in_process import Answer, post
from octavo.server.batch.requests import BadLine, BatchRequest

Item = TypeVar("Item")

_AHEAD = 2  # requests for each that can run: those that come next are tokenised while others run
_TRIES = 3
_LONGEST_PAUSE = 30.0  # seconds before a request is tried again

Done = Callable[[BatchRequest | BadLine, BatchAnswer], None]


class BatchRunner:
    """One batch, in one event loop.

    Args:
        app: what answers.
        items: what is to be done; in a thread of its own, since reading may have to wait.
        done: told of each line that was written.
    """

    def __init__(self, app: FastAPI, items: Iterator[BatchRequest | BadLine], output: Output, done: Done) -> None:
        self._app = app
        self._items = items
        self._output = output
        self._done = done
        context = app.state.octavo
        self._room = _Room(_AHEAD * context.admission.places, context.settings.limits.max_buffered_bytes)
        self._alone = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._read_all = False
        self.num_unanswered = 0  # of what was read
        self.stopped = False

    async def run(self) -> bool:
        """Whether all was answered. Raises OctavoError for an input that cannot be read on, or an output that cannot
        be written: then nothing goes on."""
        try:
            async with self._app.router.lifespan_context(self._app), asyncio.TaskGroup() as group:
                self._reading = group.create_task(self._read(group))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return self._read_all and not self.num_unanswered

    def stop(self) -> None:
        """Read no further, and finish what is under way; called again: end that as well."""
        if self._reading is not None:
            self._reading.cancel()
        if self.stopped:
            for task in list(self._answering):
                task.cancel()
        self.stopped = True

    async def _read(self, group: asyncio.TaskGroup) -> None:
        reader = _Reader(self._items)
        while (item := await reader.next()) is not None:
            if isinstance(item, BadLine):
                error = BatchError(item.code, item.message)
                self._write(item, BatchAnswer(item.id, item.custom_id, None, error))
                continue
            await self._room.take(len(item.body))
            self.num_unanswered += 1
            task = group.create_task(self._answer(item))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        self._read_all = True

    async def _answer(self, request: BatchRequest) -> None:
        try:
            answer = await self._asked(request)
        finally:
            self._room.give(len(request.body))
        response = BatchResponse(answer.status, answer.headers["x-request-id"], msgspec.Raw(answer.body))
        self._write(request, BatchAnswer(request.id, request.custom_id, response, None))
        self.num_unanswered -= 1

    async def _asked(self, request: BatchRequest) -> Answer:
        answer = await post(self._app, request.url, request.body)
        for _ in range(_TRIES - 1):
            if not _may_succeed(answer):
                break
            # One by one: if a request is what ends the engine, it is not to take the others' next try with it.
            async with self._alone:
                await asyncio.sleep(min(float(answer.headers.get("retry-after", 0)), _LONGEST_PAUSE))
                answer = await post(self._app, request.url, request.body)
        return answer

    def _write(self, item: BatchRequest | BadLine, answer: BatchAnswer) -> None:
        self._output.put(answer)
        self._done(item, answer)


def _may_succeed(answer: Answer) -> bool:
    """If it is asked again."""
    return answer.status == 429 or answer.status >= 500


class _Room:
    """For so many requests at once, and so many bytes of them; one of more bytes goes alone."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._requests = 0
        self._bytes = 0
        self._given = asyncio.Event()

    async def take(self, size: int) -> None:
        while self._requests >= self._most or (self._requests and self._bytes + size > self._most_bytes):
            self._given.clear()
            await self._given.wait()
        self._requests += 1
        self._bytes += size

    def give(self, size: int) -> None:
        self._requests -= 1
        self._bytes -= size
        self._given.set()


class _Reader(Generic[Item]):
    """An iterator that may have to wait, such as for lines of a pipe, read in a thread that nobody waits for."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Semaphore(0)
        self._found: asyncio.Queue[Item | Exception | None] = asyncio.Queue()
        threading.Thread(target=self._run, name="octavo-batch-input", daemon=True).start()

    async def next(self) -> Item | None:
        """None behind the last. Raises what the iterator raises."""
        self._wanted.release()
        found = await self._found.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self) -> None:
        try:
            while True:
                self._wanted.acquire()
                item = next(self._items, None)
                self._tell(item)
                if item is None:
                    return
        except Exception as error:
            self._tell(error)

    def _tell(self, found: Item | Exception | None) -> None:
        with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)
