"""The server as a program: a socket, uvicorn on it, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from fastapi import FastAPI

from octavo.core.errors import ConfigError
from octavo.server.app import make_app
from octavo.server.protocol import TimedProtocol
from octavo.server.settings import ServerSettings
from octavo.server.sockets import BACKLOG

if TYPE_CHECKING:
    from octavo.server.served_llm import ServedLLM

log = logging.getLogger(__name__)

_FILES = 1 << 16  # open at once
_POLL = 0.05  # seconds between looks at what is still under way while the server drains


def check_tls(settings: ServerSettings) -> None:
    """Raises ConfigError for files that are no key and certificate."""
    if settings.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:
        raise ConfigError(f"ssl_certfile: the certificate and its key cannot be used: {error}") from None


class Server(uvicorn.Server):
    """uvicorn, with an end of its own. The first SIGTERM or SIGINT: /ready says no, new requests are refused, and those
    under way go on, for `shutdown_timeout` at most; then `end` ends them, with an error. The second ends them at once.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, end: Callable[[], None]) -> None:
        of_protocol = {"head_timeout": settings.body_timeout, "write_timeout": settings.write_timeout}
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                http=type("Protocol", (TimedProtocol,), of_protocol),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=settings.limits.max_header_bytes,
                timeout_graceful_shutdown=5,  # behind ours: for answers to be sent
            )
        )
        self._context = app.state.octavo
        self._state = app.state
        self._settings = settings
        self._end = end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.forced = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if self._draining is not None:
            self._draining.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler, in the main thread, between any two instructions."""
        del frame
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stop, signal.Signals(sig).name)

    def stop(self, why: str = "a call") -> None:
        """Begin to end; called again: end now."""
        if self._draining is None:
            log.warning("%s: shutting down; requests under way have %g s", why, self._settings.shutdown_timeout)
            self._state.draining = True
            self._draining = asyncio.ensure_future(self._drain())
        elif not self.forced:
            log.warning("%s again: ending now", why)
            self.forced = True

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.shutdown_timeout
        while self._context.num_open and loop.time() < until and not self.forced:
            await asyncio.sleep(_POLL)
        if self._context.num_open:
            # Whoever waits is told.
            await asyncio.to_thread(self._end)
        self.should_exit = True


def run_server(llm: ServedLLM, settings: ServerSettings, listener: socket.socket, ready: Callable[[str], None]) -> bool:
    """Serve until a signal ends it; whether it was forced to. `ready` gets the address when requests are taken."""
    _raise_file_limit()
    server = Server(make_app(llm, settings, llm.metrics), settings, llm.close)
    for name in ("uvicorn.error", "uvicorn"):
        # What clients do is no warning of ours; what is wrong with the application is told by itself.
        logging.getLogger(name).setLevel(logging.CRITICAL)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready(url_of(settings, listener))
        await serving

    with suppress(KeyboardInterrupt):
        uvloop.run(serve())
    return server.forced


def _raise_file_limit() -> None:
    """Each connection takes a file descriptor, and the limit that shells set is for programs with few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """For people; of a Unix socket its path."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if settings.ssl_certfile is None else 'https'}://{shown}:{port}{settings.root_path}"
