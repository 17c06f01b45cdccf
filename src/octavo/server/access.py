"""Who may ask, and how much at once: API keys, requests a key has under way, draining; and the id of each request.

Plain ASGI middleware around the whole application, routes that do not exist included: what is not named here as open
needs a key, whatever its path looks like.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.envelope import error_response, is_anthropic, route_path
from octavo.server.errors import ApiError, retry_after
from octavo.server.records import RequestRecord, current_record, of_request
from octavo.server.routes import margins, page
from octavo.server.settings import MAX_KEY

if TYPE_CHECKING:
    from octavo.server.context import ServerContext

log = logging.getLogger(__name__)

# To everybody: a browser sends no key for the page, which asks for one; its files are the same everywhere.
OPEN = frozenset(["/live"]) | page.PATHS
PROBES = frozenset(["/live", "/health", "/ready"])
# Asked again and again by machines: told at level debug, and in no trace.
QUIET = PROBES | page.PATHS | {"/metrics", "/v1/octavo/stats"}
_ID = re.compile(rb"[A-Za-z0-9._:-]+")


class Access:
    """The outermost layer. What a handler needs to know is in the scope: ``octavo.request_id``, and ``octavo.key``, a
    digest of the API key, None without keys."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context
        settings = context.settings
        self._keys = [_digest(key.encode()) for key in settings.api_key]
        self._most = settings.max_concurrent_per_key
        self._running: Counter[bytes | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        if self._context.settings.root_path:
            # Whether the proxy leaves it in paths or not: routes are found either way.
            scope["root_path"] = self._context.settings.root_path
        record = RequestRecord(scope["method"], scope["path"], request_id=secrets.token_hex(16))
        current_record.set(record)  # of this task, which is the request's own
        quiet = route_path(scope) in QUIET
        tracing = None if quiet else self._context.tracing
        span = None if tracing is None else tracing.begin(scope, record)
        try:
            await self._answer(scope, receive, send, record)
        finally:
            record.duration = time.monotonic() - record.began
            record.route = getattr(scope.get("route"), "path_format", None)
            if tracing is not None:
                tracing.end(span, record)
            record.tell(logging.DEBUG if quiet else logging.WARNING if record.is_error else logging.INFO)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if is_anthropic(scope):
                    headers["Request-Id"] = record.request_id  # which its clients read
            await send(message)

        scope["octavo.request_id"] = record.request_id
        try:
            self._check_head(scope)
            record.request_id = scope["octavo.request_id"] = self._request_id(scope) or record.request_id
            key = self._check(scope)
            scope["octavo.key"] = key
            counted = key is not None and scope["method"] == "POST"
            if counted and self._most is not None and self._running[key] >= self._most:
                problem = f"this API key has {self._most} requests under way, which is as many as it may"
                raise ApiError(429, problem, headers=retry_after(self._context.admission.seconds_per_request))
            if counted:
                self._running[key] += 1
            try:
                self._context.num_open += 1
                await self._app(scope, receive, answer)
            finally:
                self._context.num_open -= 1
                if counted:
                    self._running[key] -= 1
                    if not self._running[key]:
                        del self._running[key]
        except Exception as error:
            if record.status is not None:
                record.failed = True
                log.exception("an answer broke off", extra=of_request())
                return
            await error_response(error, scope)(scope, receive, answer)

    def _check_head(self, scope: Scope) -> None:
        most = self._context.settings.limits.max_header_bytes
        path = len(scope["path"]) + len(scope["query_string"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) + path > most:
            raise ApiError(431, f"path and headers may have at most {most} bytes")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            # A proxy before us may have gone by the other one, and takes what follows for another request.
            problem = "is not for requests that have a Content-Length"
            raise ApiError(400, problem, "Transfer-Encoding", {"Connection": "close"})

    def _request_id(self, scope: Scope) -> str | None:
        most = self._context.settings.limits.max_request_id
        given = _header(scope, b"x-request-id")
        if given is None:
            return None
        if len(given) > most or not _ID.fullmatch(given):
            raise ApiError(400, f"must be 1 to {most} of the characters A-Z a-z 0-9 . _ : -", "X-Request-Id")
        return given.decode()

    def _check(self, scope: Scope) -> bytes | None:
        """Digest of the request's key. Raises ApiError."""
        path = route_path(scope)
        key = None
        if self._keys and not (path in OPEN and scope["method"] in ("GET", "HEAD")):
            key = self._authenticated(scope)
        if self._context.draining and not _is_answered_at_the_end(path):
            seconds = self._context.settings.shutdown_timeout
            raise ApiError(503, "the server is shutting down", headers=retry_after(seconds))
        return key

    def _authenticated(self, scope: Scope) -> bytes:
        given = _given_key(scope)
        digest = _digest(given or b"")
        # All are compared, each in constant time, so that time tells nothing of a key.
        found = [hmac.compare_digest(digest, key) for key in self._keys]
        if given is None or not any(found):
            problem = "an API key is needed, as `Authorization: Bearer KEY`" if given is None else "wrong API key"
            raise ApiError(401, problem, headers={"WWW-Authenticate": "Bearer"})
        return digest


def _is_answered_at_the_end(path: str) -> bool:
    """Whether requests to it are taken while the server drains: they ask how it is, or belong to a review that is under
    way, which would else wait for verdicts that cannot come."""
    return path in PROBES or path == "/metrics" or path.startswith(margins.PATH + "/")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> bytes | None:
    """Raises ApiError where it comes twice: which one a proxy looked at nobody knows."""
    values = [value for key, value in scope["headers"] if key == name]
    if len(values) > 1:
        raise ApiError(400, "is given more than once", name.decode())
    return values[0] if values else None


def _given_key(scope: Scope) -> bytes | None:
    bearer, plain = _header(scope, b"authorization"), _header(scope, b"x-api-key")
    if bearer is not None:
        scheme, _, key = bearer.partition(b" ")
        found: bytes | None = key.strip() if scheme.lower() == b"bearer" else None
    else:
        found = plain
    return found if found and len(found) <= MAX_KEY else None
