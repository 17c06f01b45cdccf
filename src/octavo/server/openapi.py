"""The OpenAPI page: bodies are read by us and not by FastAPI, so their fields are put into it here."""

from __future__ import annotations

import re
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


_EVENT = {
    "type": "object",
    "description": "each event of the stream; its data is JSON, or [DONE]",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


def describes(
    body: type[BaseModel] | None,
    answer: type[BaseModel] | None,
    summary: str,
    *,
    streams: bool = False,
    kind: str = "application/json",
    query: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Arguments of a route: schemas of its body and its answer, None for any object; whether it may answer with a
    stream; of what kind the answer is; and schemas of what may stand behind the path."""
    content: dict[str, Any] = {kind: {"schema": _schema(answer) if kind == "application/json" else {"type": "string"}}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    answers = {"200": {"description": "the answer", "content": content}, "default": _error()}
    extra: dict[str, Any] = {"responses": answers}
    if query is not None:
        extra["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
    return {"summary": summary, "openapi_extra": extra, "response_model": None}


def _schema(model: type[BaseModel] | None) -> dict[str, Any]:
    if model is None:
        return {"type": "object"}
    assert _MODELS.setdefault(model.__name__, model) is model, f"two models are called {model.__name__}"
    return {"$ref": _REF.format(model=model.__name__)}


def _error() -> dict[str, Any]:
    schema = {"$ref": _REF.format(model="Error")}
    return {"description": "an error", "content": {"application/json": {"schema": schema}}}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


_HEADERS = [
    _header(
        "X-Request-Id",
        "comes back, and is in the answer's id; made where there is none",
        {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    ),
    _header(
        "X-Request-Timeout",
        "seconds in which the request is to be answered",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
    ),
]


def _parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def page_of(app: FastAPI, root_path: str) -> dict[str, Any]:
    """The OpenAPI document."""
    page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema([(model, "validation") for model in _MODELS.values()], ref_template=_REF)
    known = page.setdefault("components", {}).setdefault("schemas", {})
    known.update({"Error": ERROR_SCHEMA, **schemas.get("$defs", {})})
    for path, methods in page["paths"].items():
        named = [_parameter(name) for name in re.findall(r"{(\w+)}", path)]
        for name, method in methods.items():
            asked = [one for one in method.get("parameters", ()) if one["in"] == "query"]
            method["parameters"] = named + asked + (_HEADERS if name == "post" else [])
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
