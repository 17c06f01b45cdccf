"""The socket to listen on: an address and a port, or a file of the Unix kind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.core.errors import ConfigError, shown
from octavo.server.settings import ServerSettings

BACKLOG = 2048
_OTHERS = 0o007  # permissions that nobody but owner and group gets


@contextmanager
def open_socket(settings: ServerSettings) -> Iterator[socket.socket]:
    """Bound and listening, so that a place that another server has is noticed at once, and clients who come early
    wait. Raises ConfigError naming the setting at fault."""
    if settings.uds is not None:
        with _unix_socket(settings.uds) as listener:
            yield listener
        return
    with _tcp_socket(settings) as listener:
        yield listener


def _tcp_socket(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named since asyncio turns Nagle's algorithm off only where it is: else each piece of an answer
    # would wait for the client's system to acknowledge the one before, which may take 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: one whose client takes nothing of what was sent is ended by the kernel, and does
            # not keep its buffers for ever.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.write_timeout * 1000))
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_why(settings, error)) from None
    listener.setblocking(False)
    return listener


def _why(settings: ServerSettings, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"host: {settings.host!r} is not an address of this machine: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return f"port: {settings.port} on {settings.host} is in use by another program; choose another with --port"
    if error.errno == errno.EACCES:
        return f"port: {settings.port} is for programs of the system alone; choose one above 1023"
    return f"host: cannot listen on {settings.host}:{settings.port}: {error.strerror}"


# --- Unix sockets ---


@contextmanager
def _unix_socket(path: str) -> Iterator[socket.socket]:
    """For its owner, by the umask also for its group, and for nobody else. The file goes when the block ends, unless it
    is another server's by then."""
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0)
        try:
            os.umask(before | _OTHERS)
            listener.bind(path)
        except OSError as error:
            raise ConfigError(f"uds: cannot listen on {shown(path)}: {error.strerror}") from None
        finally:
            os.umask(before)
        ours = _identity(path)
        try:
            listener.listen(BACKLOG)
            listener.setblocking(False)
            yield listener
        finally:
            if ours is not None and _identity(path) == ours:
                with suppress(OSError):
                    Path(path).unlink()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    """A socket of this user's on which nobody listens any more: a server that was killed has left it. Whatever else is
    there stays, and is an error."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"uds: {shown(path)} cannot be used: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"uds: {shown(path)} is there already, and is no socket")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"uds: {shown(path)} is another user's socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise ConfigError(f"uds: {shown(path)} is in use by another program")
    with suppress(FileNotFoundError):
        Path(path).unlink()
