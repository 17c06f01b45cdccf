"""The OpenAPI page: bodies are read by us and not by FastAPI, so their fields are put into it here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_MODELS: dict[str, type[BaseModel]] = {}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error", "description": "on Anthropic's routes"},
        "request_id": {"type": "string", "description": "on Anthropic's routes"},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "what is wrong, and what is allowed"},
                "type": {"type": "string", "description": "kind of error, such as BadRequestError"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": "integer", "description": "the status of HTTP"},
            },
        },
    },
}


def describes(body: type[BaseModel] | None, summary: str, *, streams: bool = True) -> dict[str, Any]:
    """Arguments of a route: its body's schema, and that it may answer with a stream."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if body is not None and streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    answers = {"200": {"description": "the answer", "content": content}, "default": _error()}
    extra: dict[str, Any] = {"responses": answers}
    if body is not None:
        _MODELS[body.__name__] = body
        schema = {"$ref": _REF.format(model=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "openapi_extra": extra, "response_model": None}


def _error() -> dict[str, Any]:
    schema = {"$ref": _REF.format(model="Error")}
    return {"description": "an error", "content": {"application/json": {"schema": schema}}}


def page_of(app: FastAPI, root_path: str) -> dict[str, Any]:
    """The OpenAPI document."""
    page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema([(model, "validation") for model in _MODELS.values()], ref_template=_REF)
    known = page.setdefault("components", {}).setdefault("schemas", {})
    known.update({"Error": ERROR_SCHEMA, **schemas.get("$defs", {})})
    known.pop("HTTPValidationError", None)
    known.pop("ValidationError", None)
    if root_path:
        page["servers"] = [{"url": root_path}]
    page["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    page["security"] = [{"bearer": []}, {"key": []}]
    return page
