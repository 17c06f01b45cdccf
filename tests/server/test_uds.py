"""A server on a Unix socket: who may connect, what happens to the file, and the same timeouts as elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from uvicorn.protocols.http.flow_control import FlowControl

from octavo.core.errors import ConfigError
from octavo.server.protocol import TimedProtocol
from octavo.server.settings import ServerSettings
from octavo.server.sockets import open_socket
from tests.server.conftest import MODEL, serving
from tests.server.test_access import self_signed
from tests.server.test_serve import ended, served


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "octavo.sock"


def listen(path: Path | str) -> Any:
    return open_socket(ServerSettings(uds=str(path)))


def left_behind(path: Path) -> None:
    """By a server that was killed."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# --- the file ---


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o750), (0o077, 0o700), (0o002, 0o770), (0o000, 0o770)])
def test_who_may_connect(path: Path, umask: Callable[[int], int], mask: int, mode: int) -> None:
    """Never others; the group, if the umask lets it write. The umask is as before."""
    umask(mask)
    with listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert umask(mask) == mask and not path.exists()


def test_a_socket_left_behind_is_removed(path: Path) -> None:
    left_behind(path)
    before = path.stat().st_ino, path.stat().st_ctime_ns
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert (path.stat().st_ino, path.stat().st_ctime_ns) != before
    assert not path.exists()


def test_what_is_not_ours_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a server that takes another's place, or removes a file that is none of its."""
    with listen(path):
        with pytest.raises(ConfigError, match=r"^uds: .* is in use by another program"), listen(path):
            pass
        assert path.is_socket()
    for make in (Path.touch, Path.mkdir):
        make(path)
        with pytest.raises(ConfigError, match=r"^uds: .* is there already, and is no socket"), listen(path):
            pass
        path.unlink() if path.is_file() else path.rmdir()
    left_behind(path)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="is no socket"), listen(link):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"^uds: .* is another user's socket"), listen(path):
        pass
    assert path.is_socket() and link.is_symlink()


def test_another_servers_file_is_not_removed_at_the_end(path: Path) -> None:
    with listen(path):
        path.unlink()
        left_behind(path)
        other = path.stat().st_ino
    assert path.stat().st_ino == other


def test_a_file_that_went_meanwhile(path: Path) -> None:
    with listen(path):
        path.unlink()


@pytest.mark.parametrize("where", ["nowhere/octavo.sock", "file/octavo.sock"])
def test_places_where_there_can_be_none(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^uds: "), listen(tmp_path / where):
        pass


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"uds": ""}, "uds"), ({"uds": "a" * 108}, "uds"), ({"uds": "a\0b"}, "uds"), ({"uds": 3}, "uds"),
     ({"uds": "a", "port": 8001}, "uds"), ({"uds": "a", "host": "::1"}, "uds")],
)  # fmt: skip
def test_settings(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        ServerSettings(**fields)


# --- the server ---


def asking(path: Path, **options: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path), **options), timeout=60)


def on_socket(model: Path, path: Path, **more: Any) -> Any:
    return serving(model, ServerSettings(uds=str(path), served_model_name=(MODEL,), **more))


def test_answers_streams_and_keys(tiny_llama_dir: Path, path: Path) -> None:
    with on_socket(tiny_llama_dir, path, api_key=("k",), root_path="/llm") as running:
        assert running.url == f"unix:{path}"
        with asking(path) as http:
            assert http.get("http://octavo/live").status_code == 200
            assert http.get("http://octavo/v1/models").status_code == 401
            client = OpenAI(base_url="http://octavo/llm/v1", api_key="k", http_client=http, max_retries=0)
            answer = client.completions.create(model=MODEL, prompt="the fox", max_tokens=5, stream=True)
            assert sum(bool(chunk.choices) for chunk in answer) >= 1
    assert not path.exists()


def test_tls_over_it(tiny_llama_dir: Path, path: Path, tmp_path: Path) -> None:
    key, certificate = self_signed(tmp_path)
    with on_socket(tiny_llama_dir, path, ssl_keyfile=str(key), ssl_certfile=str(certificate)):
        with asking(path, verify=ssl.create_default_context(cafile=str(certificate))) as http:
            assert http.get("https://127.0.0.1/live").status_code == 200
        with asking(path) as http, pytest.raises(httpx.TransportError):
            http.get("http://127.0.0.1/live")


def test_a_client_that_reads_nothing_is_given_up(tiny_llama_dir: Path, path: Path) -> None:
    """The kernel does it for TCP; here nobody else would, and the answer would stay in memory."""
    with on_socket(tiny_llama_dir, path, write_timeout=0.3) as running:
        with socket.socket(socket.AF_UNIX) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(str(path))
            request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
            client.sendall(request * 20)
            until(lambda: running.server.server_state.connections)
            until(lambda: not running.server.server_state.connections)
            client.settimeout(60)
            received = b"".join(iter(lambda: client.recv(1 << 20), b""))
        assert received.startswith(b"HTTP/1.1 200") and received.count(b"HTTP/1.1 200") < 20


class SlowClient:
    """Transport, event loop and timer of a connection whose client takes some bytes now and then."""

    def __init__(self) -> None:
        self.waiting = 0
        self.timers: list[Any] = []
        self.aborted = self.cancelled = False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True

    def call_later(self, seconds: float, look: Any) -> SlowClient:
        self.timers.append((seconds, look))
        return self

    def cancel(self) -> None:
        self.cancelled = True

    def look(self) -> None:
        self.timers.pop()[1]()


def test_a_client_that_reads_slowly_is_not() -> None:
    """As long as less waits each time that somebody looks."""
    client = SlowClient()
    protocol = TimedProtocol.__new__(TimedProtocol)
    protocol.write_timeout = 5.0
    protocol.transport, protocol.loop, protocol.flow = client, client, FlowControl(client)  # type: ignore[assignment,arg-type]
    client.waiting = 100_000
    protocol.pause_writing()
    assert protocol.flow.write_paused and client.timers[0][0] == 5.0
    for waiting in (99_999, 50_000, 20_000):
        client.waiting = waiting
        client.look()
        assert not client.aborted and len(client.timers) == 1
    protocol.resume_writing()
    assert client.cancelled and not protocol.flow.write_paused
    protocol.pause_writing()
    client.look()
    assert client.aborted


def until(done: Callable[[], Any]) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


# --- the program ---


def test_the_program(tiny_llama_dir: Path, path: Path) -> None:
    with started(tiny_llama_dir, path) as (process, url):
        assert url == f"unix:{path}" and stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
        with asking(path) as http:
            assert http.get("http://octavo/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        code, err = ended(process)
        assert code == 0 and "everybody" not in err and not path.exists()


def test_the_program_after_one_that_was_killed(tiny_llama_dir: Path, path: Path) -> None:
    with started(tiny_llama_dir, path) as (process, _):
        process.kill()
        process.wait()
        assert path.is_socket()
    with started(tiny_llama_dir, path), asking(path) as http:
        assert http.get("http://octavo/live").status_code == 200


def started(model: Path, path: Path) -> Any:
    return served(model, "--uds", str(path), place=())
