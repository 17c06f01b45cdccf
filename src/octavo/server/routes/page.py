"""The page at /, its files, and what its strip shows: /v1/octavo/stats."""

from __future__ import annotations

from importlib.resources import files

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes
from octavo.server.openapi import describes

router = APIRouter()

_KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_NAMES = "index.html", "main.js", "api.js", "dom.js", "chat.js", "document.js", "tree.js", "strip.js", "style.css"
# Nothing comes from elsewhere and nothing goes there; what a model says becomes no markup.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PATHS = frozenset(["/", *(f"/page/{name}" for name in _NAMES[1:])])


def _add(path: str, name: str) -> None:
    data = (files("octavo.server") / "page" / name).read_bytes()

    @router.get(path, include_in_schema=False)
    async def endpoint() -> Response:
        return Response(data, media_type=_KINDS[name.rpartition(".")[2]], headers=_HEADERS)


_add("/", _NAMES[0])
for _name in _NAMES[1:]:
    _add(f"/page/{_name}", _name)


@router.get("/v1/octavo/stats", **describes(None, None, "What the engine does now"))
@route
async def stats(request: Request, context: ServerContext) -> Response:
    del request
    return JSONBytes(msgspec.to_builtins(context.llm.figures()))
