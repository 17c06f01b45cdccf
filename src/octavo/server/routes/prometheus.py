"""/metrics: what Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError
from octavo.server.openapi import describes

router = APIRouter()

_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", **describes(None, None, "Counters and times for Prometheus", kind="text/plain"))
@route
async def metrics(request: Request, context: ServerContext) -> Response:
    del request
    if context.metrics is None:
        raise ApiError(404, "there is no such route")
    return Response(context.metrics.exposition(), media_type=_FORMAT)
