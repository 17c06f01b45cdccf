"""Whether the server is up, and what it is: /live, /ready, /health, /version, and with debug routes /server_info."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.server.answer_types import Status, Version
from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import ApiError, JSONBytes, retry_after
from octavo.server.openapi import describes

router = APIRouter()
debug_router = APIRouter()

_PATIENCE = 30.0  # seconds; a step takes less, and so does an engine that lives to say so between two of them


@router.get("/live", **describes(None, Status, "Whether the server runs at all; needs no key"))
async def live() -> Response:
    return JSONBytes({"status": "ok"})


@router.get("/health", **describes(None, Status, "Whether the engine answers"))
@route
async def health(request: Request, context: ServerContext) -> Response:
    del request
    await _check_engine(context)
    return JSONBytes({"status": "ok"})


@router.get("/ready", **describes(None, Status, "Whether new requests are taken"))
@route
async def ready(request: Request, context: ServerContext) -> Response:
    del request
    if context.draining:
        seconds = context.settings.shutdown_timeout
        raise ApiError(503, "the server is shutting down", headers=retry_after(seconds))
    await _check_engine(context)
    return JSONBytes({"status": "ok"})


async def _check_engine(context: ServerContext) -> None:
    """Raises EngineClosedError, or ApiError for one that does not answer."""
    try:
        async with asyncio.timeout(_PATIENCE):
            # The smallest question that its thread answers itself.
            await context.llm.explain_cache({"prompt_token_ids": [0]})
    except TimeoutError:
        raise ApiError(503, "the engine does not answer", headers=retry_after(_PATIENCE)) from None


for _path, _probe in (("/live", live), ("/health", health), ("/ready", ready)):
    router.head(_path, include_in_schema=False)(_probe)  # as load balancers ask


@router.get("/version", **describes(None, Version, "The version of Octavo"))
async def version() -> Response:
    return JSONBytes({"version": __version__})


@debug_router.get("/server_info", **describes(None, None, "Settings and load"))
@route
async def server_info(request: Request, context: ServerContext) -> Response:
    del request
    settings = asdict(context.settings)
    settings["api_key"] = len(settings["api_key"])  # how many
    admission = context.admission
    load = {
        "num_requests": admission.num_requests,
        "num_tokens": admission.num_tokens,
        "num_refused": admission.num_refused,
        "num_open": context.num_open,
    }
    return JSONBytes({"settings": settings, "load": load, "engine": asdict(context.llm.config)})
