"""Errors as clients get them: OpenAI's envelope, whatever went wrong and wherever.

``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``; types and codes, which repeat the status, are
vLLM's.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.responses import Response

from octavo.core.errors import EngineClosedError, InvalidRequestError, OctavoError, RequestFailedError, shortened, shown
from octavo.core.structured import TOO_MANY
from octavo.server.records import of_request

log = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    431: "HeaderFieldsTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
_RETRY_GRAMMAR = 5  # seconds after which one of the grammars that are compiled has ended, or was given up
RETRY_CLOSED = 5  # seconds after which an engine that was closed may be there again
# How the sampler's error begins where a request's own constraints leave no token: known when one is to be drawn, and
# the client's to mend.
_NOTHING_LEFT = "no token can be drawn"

# Absolute paths of two parts or more, as messages of the system and of libraries hold them.
_PATH = re.compile(r"(?<![\w/.])(?:/[\w.@+~-]+){2,}/?|\b[A-Za-z]:\\[^\s'\"]+")


class ApiError(Exception):
    """A request that is answered with an error status.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        headers: to send with it.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class JSONBytes(Response):
    """A JSON answer. Numbers that are not finite become null."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(encode(content), status, headers)

    def render(self, content: bytes) -> bytes:
        return content


encode = msgspec.json.Encoder().encode


def invalid(field: str, problem: str) -> ApiError:
    """400, naming the field."""
    return as_api_error(InvalidRequestError(field, problem))


def unknown_field(field: str, names: Iterable[str], allowed: Iterable[str]) -> ApiError:
    """400 for an object with `names` that are not allowed in it, of which the first is told with what was meant."""
    name = min(names)
    return invalid(field, f"{shown(name)} is not known here; {instead(name, allowed)}")


def instead(name: str, allowed: Iterable[str]) -> str:
    """What to write instead of a name that is not known."""
    known = sorted(allowed)
    close = difflib.get_close_matches(name[:80], known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(known)}"


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds)))}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error: of its own mistakes all, of ours what is fit for strangers."""
    if isinstance(error, BaseExceptionGroup):
        return as_api_error(error.exceptions[0])
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        if error.problem.startswith(TOO_MANY):
            return ApiError(429, printable(str(error)), error.field, retry_after(_RETRY_GRAMMAR))
        return ApiError(400, printable(str(error)), error.field)
    if isinstance(error, EngineClosedError):
        message = "the engine is not running"
        return ApiError(503, message, headers=retry_after(RETRY_CLOSED))
    if isinstance(error, RequestFailedError) and str(error).startswith(_NOTHING_LEFT):
        return ApiError(400, printable(str(error)))
    if isinstance(error, RequestFailedError):
        log.warning("a request failed: %s", printable(str(error)), extra=of_request())
        return ApiError(500, f"the request failed: {scrubbed(str(error))}")
    if isinstance(error, OctavoError):  # of documents, for one
        return ApiError(400, scrubbed(str(error)))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request was not answered in time")
    log.error("a request raised", exc_info=error, extra=of_request())
    return ApiError(500, "internal error; the server's log says more")


def printable(text: str) -> str:
    """One line, without what could drive a terminal or end a line of a log."""
    return "".join(c if c.isprintable() else " " for c in shortened(text))


def scrubbed(text: str) -> str:
    """The same without paths of this machine, and only the first line: a traceback has more."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return _PATH.sub("(path)", printable(first))
