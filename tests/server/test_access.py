"""API keys on every route but one, whatever its path looks like; how much a key may have under way; draining; CORS."""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import AuthenticationError, OpenAI

from octavo.core.errors import ConfigError
from octavo.server.access import OPEN
from octavo.server.admission import Admission
from octavo.server.errors import ApiError, scrubbed
from octavo.server.serving import check_tls
from octavo.server.settings import Limits, ServerSettings, read_keys
from tests.pace import held
from tests.server.conftest import MODEL, Running, error_of, serving
from tests.server.test_streams import LONG, PATH, connect, until

KEYS = ("sk-first", "sk-second")
GOOD = {"Authorization": "Bearer sk-first"}


@pytest.fixture(scope="module")
def guarded(tiny_llama_dir: Path) -> Iterator[Running]:
    settings = ServerSettings(
        port=0,
        served_model_name=(MODEL,),
        api_key=KEYS,
        max_concurrent_per_key=2,
        allowed_origins=("https://app.example",),
        root_path="/llm",
        enable_debug_routes=True,
        enable_tokenizer_info_endpoint=True,
    )
    with serving(tiny_llama_dir, settings) as running:
        running.url = running.url.removesuffix("/llm")
        yield running


def raw(server: Running, target: str, *headers: str, method: str = "GET") -> bytes:
    """The head of an answer to a request with a path as it is."""
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")[0]


def test_every_route_needs_a_key_but_for_live_and_the_page(guarded: Running) -> None:
    app = guarded.server.config.app
    paths = {*app.openapi()["paths"], "/openapi.json", "/docs", "/nowhere", "/", ""}  # type: ignore[union-attr]
    assert {
        "/v1/completions",
        "/tokenize",
        "/openapi.json",
        "/server_info",
        "/tokenizer_info",
        "/reset_prefix_cache",
    } <= paths
    for path in paths:
        for method in ("GET", "POST", "OPTIONS", "DELETE", "HEAD"):
            if (path or "/") in OPEN and method in ("GET", "HEAD"):
                continue
            status = guarded.client.request(method, guarded.url + path.replace("{", "").replace("}", "")).status_code
            assert status == 401, (method, path)
    assert guarded.get("/live").status_code == guarded.get("/llm/live").status_code == 200


@pytest.mark.parametrize("path", ["/live", "/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(server: Running, path: str) -> None:
    answer = server.client.head(server.url + path)
    assert answer.status_code == 200 and not answer.content


def test_the_page_for_people_comes_from_here_alone(server: Running) -> None:
    page = server.get("/docs").text
    found = re.findall(r'(?:src|href|url)=?:? ?["\']([^"\']+)', page)
    assert len(found) >= 4 and all(url.startswith("/") for url in found)
    for url in found:
        assert server.get(url).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/live/../v1/models",
        "/v1/../live/../v1/models",
        "/live//",
        "/live/",
        "/live%2f..%2fv1/models",
        "/%6cive/x",
        "/live;x",
        "//live",
        "/llm//live",
        "/llm/llm/live",
        "/LIVE",
        "/v1/models?api_key=sk-first",
        "/v1/models?key=sk-first",
        "http://x/v1/models",
    ],
)
def test_path_tricks(guarded: Running, target: str) -> None:
    assert raw(guarded, target).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "header",
    [
        "X-Nothing: 1",
        "Authorization: sk-first",
        "Authorization: Basic sk-first",
        "Authorization: Bearer",
        "Authorization: Bearer ",
        "Authorization: Bearer sk-firs",
        "Authorization: Bearer sk-first2",
        "Authorization: Bearer sk-first sk-second",
        "Authorization: Bearer SK-FIRST",
        "Authorization: Bearer " + "a" * 5000,
        "Authorization: Bearer \xff\xfe",
        "X-Api-Key: wrong",
        "Cookie: api_key=sk-first",
    ],
)
def test_keys_that_are_none(guarded: Running, header: str) -> None:
    head = raw(guarded, "/v1/models", header)
    assert head.startswith(b"HTTP/1.1 401 ") and b"www-authenticate: bearer" in head.lower()


def test_keys(guarded: Running) -> None:
    for header in ("Authorization: Bearer sk-first", "authorization: bearer  sk-second", "X-Api-Key: sk-second"):
        assert raw(guarded, "/v1/models", header).startswith(b"HTTP/1.1 200 ")
        assert raw(guarded, "/llm/v1/models", header).startswith(b"HTTP/1.1 200 ")
    twice = raw(guarded, "/v1/models", "Authorization: Bearer sk-first", "Authorization: Bearer wrong")
    assert twice.startswith(b"HTTP/1.1 400 ")
    error_of(guarded.get("/v1/models"), 401)
    client = OpenAI(base_url=guarded.url + "/v1", api_key="sk-first", max_retries=0)
    assert client.models.list().data[0].id == MODEL
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_key_has_so_many_requests_under_way(guarded: Running) -> None:
    """Others are not touched by it; and what it has counts no more when the client has gone."""
    with held(guarded.engine, lambda: False, after=2):
        tasks = [_connect(guarded) for _ in range(2)]
        until(guarded, 2)
        refused = guarded.post(PATH, LONG, headers=GOOD)
        error_of(refused, 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert guarded.get("/v1/models", headers=GOOD).status_code == 200
        other = {"Authorization": "Bearer sk-second"}
        assert guarded.post("/tokenize", {"prompt": "x"}, headers=other).status_code == 200
        for task in tasks:
            task.close()
        until(guarded, 0)
    guarded.until_idle()
    assert guarded.post(PATH, {"prompt": "x", "max_tokens": 1}, headers=GOOD).status_code == 200


def _connect(server: Running) -> socket.socket:
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port))
    body = b'{"prompt": "x", "max_tokens": 480, "ignore_eos": true}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    connection.sendall((head + "Authorization: Bearer sk-first\r\n\r\n").encode() + body)
    return connection


def test_a_review_is_for_who_began_it(guarded: Running) -> None:
    document = "The fox is quick. " * 20
    body = {"document": document, "question": "Who?", "segment_tokens": 50, "stream": True, "request_id": "x"}
    with (
        held(guarded.engine, lambda: False, after=4),
        guarded.client.stream(
            "POST", guarded.url + "/v1/octavo/margins", json=body, headers=GOOD, timeout=30
        ) as response,
    ):
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # kept: the connection is closed with it
        next(lines)
        path = "/v1/octavo/margins/margins-x/stop_reading"
        other = {"Authorization": "Bearer sk-second"}
        error_of(guarded.post(path, {}, headers=other), 404)
        assert guarded.post(path, {}, headers=GOOD).status_code == 200
    guarded.until_idle()


def test_cors(guarded: Running, server: Running) -> None:
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(guarded.url + PATH, headers=ask)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    for headers in ("authorization,x-request-timeout", "x-api-key,anthropic-version,anthropic-beta"):
        asked = httpx.options(guarded.url + PATH, headers={**ask, "Access-Control-Request-Headers": headers})
        assert asked.status_code == 200
    other = httpx.options(guarded.url + PATH, headers={**ask, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.options(server.url + PATH, headers=ask).headers


def test_the_tokenizer_told(guarded: Running, server: Running) -> None:
    """Behind a switch. What is told is what /tokenize understands."""
    error_of(server.get("/tokenizer_info"), 404)
    told = guarded.get("/tokenizer_info", headers=GOOD).json()
    tokenizer = guarded.llm.tokenizer
    assert told["chat_template"] == tokenizer.chat_template and told["model_max_length"] == 2048
    assert {name: told[name] for name in tokenizer.special_tokens} == tokenizer.special_tokens
    body = {"prompt": told["eos_token"], "add_special_tokens": False}
    found = guarded.post("/tokenize", body, headers=GOOD).json()
    assert tuple(found["tokens"]) == tokenizer.eos_token_ids


def test_debug_routes(guarded: Running, server: Running) -> None:
    """Behind a switch, and they tell no key."""
    error_of(server.get("/server_info"), 404)
    told = guarded.get("/server_info", headers=GOOD)
    assert told.json()["load"]["num_requests"] == 0 and "sk-" not in told.text


def test_the_probes_and_a_drain(tiny_llama_dir: Path) -> None:
    """What is under way goes on, what is new is refused; and an engine that is gone is told as such."""
    with serving(tiny_llama_dir) as running:
        for path in ("/live", "/ready", "/health"):
            assert running.get(path).status_code == 200
        with held(running.engine, lambda: running.server._state.draining, after=2):
            connection = connect(running, {**LONG, "max_tokens": 20})
            until(running, 1)
            running.server._state.draining = True
        assert running.get("/live").status_code == running.get("/health").status_code == 200
        for refused in (running.get("/ready"), running.post(PATH, LONG), running.get("/v1/models")):
            error_of(refused, 503)
            assert int(refused.headers["retry-after"]) >= 1
        connection.settimeout(30)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.close()
        running.server._state.draining = False
        running.llm.close()
        for refused in (running.get("/ready"), running.get("/health"), running.post(PATH, LONG)):
            error_of(refused, 503)
            assert int(refused.headers["retry-after"]) >= 1
        error_of(running.post(PATH, {**LONG, "stream": True}), 503)
        assert running.get("/live").status_code == 200


# --- parts, by themselves ---


def test_retry_after_follows_the_rate() -> None:
    now = 0.0
    admission = Admission(2, 1000, 4, 1000, clock=lambda: now)
    for _ in range(10):  # one each half second
        with admission.admit(1, 10):
            now += 0.5
    assert admission.seconds_per_request == pytest.approx(0.45)
    with admission.admit(6, 60):
        with pytest.raises(ApiError) as refused, admission.admit(1, 10):
            raise AssertionError
        assert refused.value.headers["Retry-After"] == "2"  # four wait
        now += 1000
        with pytest.raises(ApiError) as unknown, admission.admit(1, 10):
            raise AssertionError
        assert unknown.value.headers["Retry-After"] == "20"
    # A request with many prompts goes in as a whole.
    with admission.admit(1, 1999), admission.admit(99, 10**6), pytest.raises(ApiError, match="requests"):  # noqa: SIM117
        with admission.admit(1, 1):
            raise AssertionError
    with admission.admit(1, 2000), pytest.raises(ApiError, match="tokens"), admission.admit(1, 1):
        raise AssertionError
    assert admission.num_requests == admission.num_tokens == 0


def test_scrubbing() -> None:
    told = scrubbed("OSError: /home/me/models/x.gguf is gone\nTraceback: more \x1b[31m")
    assert told == "OSError: (path) is gone"
    assert scrubbed("a / b, 1/2, https://x.org/a/b") == "a / b, 1/2, https://x.org/a/b"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"port": -1}, "port"),
        ({"port": 70000}, "port"),
        ({"port": True}, "port"),
        ({"host": ""}, "host"),
        ({"api_key": ("a b",)}, "api_key"),
        ({"api_key": ("é",)}, "api_key"),
        ({"api_key": ("",)}, "api_key"),
        ({"api_key": ("a" * 5000,)}, "api_key"),
        ({"root_path": "llm"}, "root_path"),
        ({"ssl_keyfile": "/nowhere", "ssl_certfile": "/nowhere"}, "ssl_keyfile"),
        ({"max_concurrent_per_key": 1}, "max_concurrent_per_key"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"body_timeout": float("nan")}, "body_timeout"),
        ({"generation_config": "folder"}, "generation_config"),
        ({"enable_debug_routes": 1}, "enable_debug_routes"),
        ({"limits": {"max_n": 0}}, "limits.max_n"),
        ({"limits": {"most": 1}}, "limits"),
        ({"limits": 5}, "limits"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        ServerSettings(**fields)


def test_settings_hold() -> None:
    settings = ServerSettings(api_key="secret", limits={"max_n": 3})
    assert settings.limits == Limits(max_n=3) and settings.api_key == ("secret",)
    assert "secret" not in repr(settings)


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nsk-a\n\n  sk-b  \n")
    assert read_keys(str(file)) == ["sk-a", "sk-b"]
    file.write_text("# none\n")
    for path in (file, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_keys(str(path))


# --- TLS ---


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Key and certificate of 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "octavo")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).add_extension(address, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    files = folder / "key.pem", folder / "certificate.pem"
    encoding = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    files[0].write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    files[1].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    return files


def test_tls(tiny_llama_dir: Path, tmp_path: Path) -> None:
    key, certificate = self_signed(tmp_path)
    settings = ServerSettings(port=0, ssl_keyfile=str(key), ssl_certfile=str(certificate))
    check_tls(settings)
    with serving(tiny_llama_dir, settings) as running:
        assert running.url.startswith("https://127.0.0.1:")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)))
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        with trusting.stream("POST", running.url + PATH, json=body) as response:
            assert list(response.iter_lines())[-2] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):
            httpx.get(running.url.replace("https", "http") + "/live").raise_for_status()
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url + "/live")
