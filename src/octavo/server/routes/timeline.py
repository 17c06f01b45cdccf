"""/debug/timeline: what the engine did lately, as Perfetto and Chrome's tracing read it."""

from __future__ import annotations

import asyncio
import math

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import shown
from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError, JSONBytes, invalid
from octavo.server.openapi import describes
from octavo.server.served_llm import ServedLLM
from octavo.server.timeline import SECONDS, chrome_trace

debug_router = APIRouter()


_QUERY = {"seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": SECONDS, "default": SECONDS}}


@debug_router.get(
    "/debug/timeline", **describes(None, None, "The engine's last steps and requests, for Perfetto", query=_QUERY)
)
@route
async def timeline(request: Request, context: ServerContext) -> Response:
    """``?seconds=5``: the last so many."""
    given = request.query_params
    for name in given:
        if name != "seconds":
            raise invalid(name, "is not known here; seconds is")
    if not isinstance(context.llm, ServedLLM):
        raise ApiError(404, "there is no such route")
    data = await context.llm.timeline(_seconds(given.get("seconds", str(SECONDS))))
    return JSONBytes(await asyncio.to_thread(chrome_trace, data))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS:
        raise invalid("seconds", f"must be a number, more than 0 and at most {SECONDS:g}, not {shown(text)}")
    return seconds
