"""Errors as answers: one envelope, OpenAI's, to which Anthropic's routes add what clients of theirs look for.

There it is ``{"type": "error", "error": {"type": "invalid_request_error", "message": ..., "param": ..., "code": ...},
"request_id": ...}``: each kind of client finds its own.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from octavo.server.errors import ApiError, JSONBytes, as_api_error

_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_response(error: BaseException, scope: Scope) -> Response:
    """An error as the answer to the request of this scope."""
    found = as_api_error(error)
    return JSONBytes(error_body(found, scope), found.status, found.headers)


def error_body(error: ApiError, scope: Scope) -> dict[str, Any]:
    """The envelope of this request's route."""
    if not is_anthropic(scope):
        return error.body
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    inner = {**error.body["error"], "type": kind}
    return {"type": "error", "error": inner, "request_id": scope.get("octavo.request_id")}


def is_anthropic(scope: Scope) -> bool:
    """Whether the route is one of Anthropic's, or is below one."""
    path = route_path(scope)
    return path == _ANTHROPIC or path.startswith(_ANTHROPIC + "/")


def route_path(scope: Scope) -> str:
    """The path without the one under which a proxy offers the server, as routes see it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and (path == root or path.startswith(root + "/")) else path
