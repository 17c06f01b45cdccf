"""/reset_prefix_cache: forget what is cached and nobody uses."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answer_types import FreedBlocks
from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes
from octavo.server.openapi import describes

router = APIRouter()


@router.post("/reset_prefix_cache", **describes(None, FreedBlocks, "Forget cached KV that nobody uses"))
@route
async def reset_prefix_cache(request: Request, context: ServerContext) -> Response:
    del request
    return JSONBytes({"freed_blocks": await context.llm.reset_prefix_cache()})
