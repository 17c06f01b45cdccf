"""What routes of all kinds share: from a request to its answer, whatever goes wrong, usage of tokens, and streams."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from octavo.core.outputs import RequestOutput
from octavo.server.context import ServerContext, context_of
from octavo.server.envelope import error_response
from octavo.server.errors import ApiError, JSONBytes
from octavo.server.fields import Parsed, parsed
from octavo.server.generation import Deadline, Generation, Piece, answered, generate, merged
from octavo.server.json_body import ClientGoneError, read_json
from octavo.server.streams import EventStream, Outbox, first_pieces, unless_gone

Handler = Callable[[Request, ServerContext], Coroutine[Any, Any, Response]]
Answerer = Callable[[Request, ServerContext, Parsed, Deadline], Coroutine[Any, Any, Response]]
Work = Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]  # puts pieces
_FIRST = 10.0  # seconds to wait, at most, for the first piece before a stream is begun without


def route(handler: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """A handler whose errors become answers in the one envelope."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        context = context_of(request)
        try:
            with context.bodies.room() as room:
                request.scope["octavo.room"] = room
                return await handler(request, context)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return error_response(error, request.scope)

    # FastAPI reads parameters off the signature, and wraps() lends it the handler's.
    del endpoint.__wrapped__
    return endpoint


def answering(kind: type[Parsed]) -> Callable[[Answerer[Parsed]], Callable[[Request], Coroutine[Any, Any, Response]]]:
    """A `route` with a body of this kind; its work ends when the client goes away."""

    def decorated(handler: Answerer[Parsed]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        @route
        @wraps(handler)
        async def endpoint(request: Request, context: ServerContext) -> Response:
            deadline = Deadline(request, context)
            body = await body_of(request, context, kind)
            return await unless_gone(request, handler(request, context, body, deadline))

        return endpoint

    return decorated


async def body_of(request: Request, context: ServerContext, kind: type[Parsed]) -> Parsed:
    """The body as its fields. Raises ApiError, ClientGoneError."""
    settings = context.settings
    room = request.scope["octavo.room"]
    return parsed(kind, await read_json(request, room, settings.limits, settings.body_timeout))


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class UsageCount:
    """Tokens of an answer while it comes in pieces."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._completion = 0
        self._cached: dict[int, int] = {}  # by prompt

    def note(self, pieces: Iterable[Piece]) -> None:
        for number, output in pieces:
            self._cached[number] = output.num_cached_tokens
            self._completion += sum(len(one.token_ids) for one in output.outputs)

    @property
    def prompt_tokens(self) -> int:
        return self._prompt

    @property
    def completion_tokens(self) -> int:
        return self._completion

    @property
    def cached_tokens(self) -> int:
        """Of the prompt's."""
        return sum(self._cached.values())

    def as_dict(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


def usage_of(prompt_tokens: int, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    count = UsageCount(prompt_tokens)
    count.note(enumerate(outputs))
    return count.as_dict()


class Writer(Protocol):
    """One answer in the form of its route."""

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]: ...

    def chunks(self, pieces: list[Piece]) -> bytes:
        """Events."""
        ...

    def last(self) -> bytes:
        """Events behind all pieces."""
        ...


async def answer(
    context: ServerContext,
    work: Generation,
    deadline: Deadline,
    writer: Writer,
    *,
    streams: bool,
    failed: Callable[[ApiError], bytes] | None = None,
) -> Response:
    """As a whole, or as server-sent events, of which `failed` makes the last one of an error. Raises what goes wrong
    before the first token: it gets a status."""
    if not streams:
        return JSONBytes(writer.whole(await answered(context, work, deadline)))

    def run(put: Callable[[Piece], None]) -> Coroutine[Any, Any, None]:
        return generate(context, work, deadline, lambda number, output: put((number, output)))

    return await stream(context, run, merged, writer.chunks, writer.last, failed)


async def stream(
    context: ServerContext,
    work: Work,
    merge: Callable[[Any, Any], Any | None],
    write: Callable[[list[Any]], bytes],
    last: Callable[[], bytes],
    error: Callable[[ApiError], bytes] | None = None,
) -> EventStream:
    """What work puts, as server-sent events: `merge` is that of Outbox, the others those of EventStream. Raises what
    goes wrong before the first piece."""
    settings = context.settings
    outbox: Outbox[Any] = Outbox(settings.limits.stream_buffer, merge)
    outbox.start(work(outbox.put))
    first = await first_pieces(outbox, min(_FIRST, settings.sse_keep_alive_interval))
    return EventStream(
        outbox,
        first,
        write,
        last,
        keep_alive=settings.sse_keep_alive_interval,
        write_timeout=settings.write_timeout,
        error=error,
    )
