"""/v1/models: what is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answer_types import Model, Models
from octavo.server.answers import route
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes
from octavo.server.openapi import describes

router = APIRouter()


@router.get("/v1/models", **describes(None, Models, "List the models"))
@route
async def models(request: Request, context: ServerContext) -> Response:
    del request
    return JSONBytes({"object": "list", "data": [_model(context, name) for name in context.models]})


@router.get("/v1/models/{model:path}", **describes(None, Model, "Tell of one model"))
@route
async def model(request: Request, context: ServerContext) -> Response:
    return JSONBytes(_model(context, context.model_named(request.path_params["model"])))


def _model(context: ServerContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "octavo",
        "root": context.models[0],
        "parent": None,
        "max_model_len": context.llm.max_model_len,
    }
