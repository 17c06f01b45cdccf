"""The application: routes over one `AsyncLLM`, behind the layer that asks for keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.server.access import Access
from octavo.server.context import make_context
from octavo.server.envelope import error_response
from octavo.server.errors import ApiError
from octavo.server.openapi import page_of
from octavo.server.routes import (
    ask,
    beam_search,
    cache,
    chat,
    completions,
    embeddings,
    health,
    margins,
    messages,
    models,
    page,
    prometheus,
    responses,
    sessions,
    timeline,
    tokens,
)
from octavo.server.settings import ServerSettings

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.server.metrics import Metrics
    from octavo.server.tracing import Tracing

_HEADERS = ["Authorization", "Content-Type", "X-Api-Key", "X-Request-Id", "X-Request-Timeout"]  # of browsers
_HEADERS += ["Anthropic-Version", "Anthropic-Beta", "Anthropic-Dangerous-Direct-Browser-Access"]
_THREADS = 32  # that tokenise and compile grammars
_ROUTERS = [one.router for one in (completions, chat, models, tokens, health, prometheus)]
_ROUTERS += [one.router for one in (responses, messages, embeddings, cache)]
_ROUTERS += [one.router for one in (beam_search, margins, ask, sessions, page)]


def make_app(llm: AsyncLLM, settings: ServerSettings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application over an engine, which stays the caller's to close. `metrics`: what /metrics tells, if it is to.
    `app.state.draining` may be set to True: then new requests are refused, and /ready says so."""
    settings = ServerSettings() if settings is None else settings
    app = FastAPIOffline(
        title="Octavo",
        version=__version__,
        description="An OpenAI-compatible server for work that branches.",
        redirect_slashes=False,
        redoc_url=None,
        lifespan=_lifespan,
        # Spans are made by octavo.server.tracing: those of newer FastAPIs tell what clients wrote into addresses.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.draining = False
    tracing = tracing_of(settings)
    app.state.octavo = context = make_context(llm, settings, app.state, int(time.time()), metrics, tracing)
    for router in _ROUTERS:
        app.include_router(router)
    if settings.enable_tokenizer_info_endpoint:
        app.include_router(tokens.info_router)
    if settings.enable_debug_routes:
        app.include_router(health.debug_router)
        app.include_router(timeline.debug_router)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.openapi = partial(page_of, app, settings.root_path)  # type: ignore[method-assign]
    app.add_middleware(Access, context=context)
    if settings.allowed_origins:
        # Outside: a browser asks what it may before it sends a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=_HEADERS,
            expose_headers=["X-Request-Id", "Request-Id", "Retry-After"],
        )
    return app


def tracing_of(settings: ServerSettings) -> Tracing | None:
    """Raises ConfigError."""
    if settings.otlp_traces_endpoint is None:
        return None
    from octavo.server.tracing import Tracing

    return Tracing(settings.otlp_traces_endpoint)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    threads = ThreadPoolExecutor(_THREADS, "octavo-http")
    asyncio.get_running_loop().set_default_executor(threads)
    yield
    context = app.state.octavo
    context.sessions.close_all()
    context.templates.shutdown(wait=False, cancel_futures=True)
    if context.tracing is not None:
        await asyncio.to_thread(context.tracing.close)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        found = ApiError(405, f"{request.method} is not for this route", None, headers)
    elif error.status_code == 404:
        found = ApiError(404, "there is no such route")
    else:
        found = ApiError(error.status_code, str(error.detail), None, headers)
    return error_response(found, request.scope)
