"""Traces as a collector gets them: a real one, that decodes what OpenTelemetry's exporter sends over HTTP."""

from __future__ import annotations

import gzip
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from octavo.server import tracing
from octavo.server.served_llm import ServedLLM
from octavo.server.settings import ServerSettings
from tests.cli.conftest import Invoke, invoke  # noqa: F401 - a fixture
from tests.server.broken_streams import killed, left, until_answered
from tests.server.conftest import MODEL, Lines, Running, serving
from tests.server.test_logs import CHAT
from tests.server.test_serve import LONG, ended, served
from tests.server.test_streams import PATH

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MARKER = "sekretprompt"


class Collector:
    """What it was sent: spans by name, resources, paths, and all bytes."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: list[str] = []
        self.data = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
                collector.data += data
                collector.paths.append(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def spans(self) -> list[Span]:
        scopes = [scope for one in self.requests for resource in one.resource_spans for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def of(self, response: httpx.Response) -> Span:
        """The span of the request that had this answer."""
        limit, mine = time.monotonic() + 60, response.headers["x-request-id"]
        while not (found := [one for one in self.spans if plain(one)["gen_ai.request.id"] == mine]):
            assert time.monotonic() < limit
            time.sleep(0.005)
        (span,) = found
        return span

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def traced(tiny_llama_dir: Path, collector: Collector) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=tests")
        settings = ServerSettings(
            port=0,
            served_model_name=(MODEL,),
            api_key=("sekret-key",),
            otlp_traces_endpoint=collector.url,
            enable_debug_routes=True,
        )
        with serving(tiny_llama_dir, settings, ServedLLM) as running:
            running.client.headers["x-api-key"] = "sekret-key"
            yield running


def plain(span: Span) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [part.string_value for part in value.values] if kind == "array_value" else value
    return found


BODY = {"prompt": MARKER + " the fox and the dog", "max_tokens": 5, "ignore_eos": True, "stop": [MARKER + "x"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(
    traced: Running,
    collector: Collector,
    lines: Lines,
    stream: bool,
) -> None:
    """In the trace that the request says it is part of, with the attributes of OpenTelemetry and of vLLM."""
    body = {**BODY, "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stream": stream}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "X-Request-Id": f"mine-{stream}"}
    before = time.time_ns()
    answer = traced.post(PATH, body, headers=headers)
    assert answer.status_code == 200
    span = collector.of(answer)
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")
    assert span.name == "text_completion tiny" and span.kind == Span.SPAN_KIND_SERVER
    assert before <= span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
    told = plain(span)
    tokens = len(traced.llm.tokenizer.encode(BODY["prompt"]))
    expected = {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.id": f"mine-{stream}",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.n": 2,
        "gen_ai.usage.input_tokens": tokens,
        "gen_ai.usage.prompt_tokens": tokens,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.completion_tokens": 10,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert {name: told[name] for name in expected} == expected
    queue, first = told["gen_ai.latency.time_in_queue"], told["gen_ai.latency.time_to_first_token"]
    prefill, decode = told["gen_ai.latency.time_in_model_prefill"], told["gen_ai.latency.time_in_model_decode"]
    assert queue + prefill == pytest.approx(first)
    assert prefill + decode == pytest.approx(told["gen_ai.latency.time_in_model_inference"])
    assert first <= told["gen_ai.latency.e2e"] and span.status.code == Status.STATUS_CODE_UNSET
    assert lines.answered(answer)["trace_id"] == TRACE
    (resource,) = collector.requests[-1].resource_spans
    about = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert about["service.name"] == "octavo" and about["deployment.environment"] == "tests"
    assert set(collector.paths) == {"/v1/traces"}


def test_other_routes(traced: Running, collector: Collector) -> None:
    for path, body, name in (
        (CHAT, {"messages": [{"role": "user", "content": MARKER}], "max_tokens": 3}, "chat tiny"),
        ("/v1/responses", {"input": MARKER, "max_output_tokens": 3}, "chat tiny"),
        (
            "/v1/messages",
            {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": MARKER}]},
            "chat tiny",
        ),
        ("/v1/embeddings", {"input": [MARKER, "b"]}, "embeddings tiny"),
        ("/v1/octavo/beam_search", {"prompt": MARKER, "beam_width": 2, "max_tokens": 3}, "text_completion tiny"),
        ("/v1/octavo/margins", {"document": MARKER, "question": MARKER, "answer": None}, "generate_content tiny"),
        ("/tokenize", {"prompt": MARKER}, "POST /tokenize"),
    ):
        answer = traced.post(path, body)
        assert answer.status_code == 200, answer.text
        span = collector.of(answer)
        assert span.name == name and not span.parent_span_id
        assert ("gen_ai.usage.input_tokens" in plain(span)) == ("tiny" in name)


def test_requests_that_are_refused(traced: Running, collector: Collector) -> None:
    for send, name, status in (
        (lambda: traced.post(PATH, {**BODY, "temperature": MARKER}), f"POST {PATH}", 400),
        (lambda: traced.get(f"/v1/{MARKER}?key=sekret-key"), "GET", 404),
        (lambda: traced.get("/v1/models/x", headers={"x-api-key": "sekret-no"}), "GET", 401),
    ):
        span = collector.of(send())
        told = plain(span)
        assert span.name == name and told["http.response.status_code"] == status
        assert span.status.code == Status.STATUS_CODE_UNSET and "error.type" not in told


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "00-zz-zz-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", "x" * 5000)],
        [("tracestate", "a=b")],
        [("traceparent", "\xff")],
    ],
)
def test_a_parent_that_is_none(traced: Running, collector: Collector, headers: list[tuple[str, str]]) -> None:
    """A trace of its own is begun."""
    encoded = [(name, value.encode("latin-1")) for name, value in headers]
    span = collector.of(traced.client.get(traced.url + "/v1/models", headers=encoded))
    assert not span.parent_span_id and span.trace_id.hex() not in (TRACE, "0" * 32) and not span.trace_state


def test_what_is_not_sampled_is_not_sent(traced: Running, collector: Collector) -> None:
    """Nor what machines ask again and again."""
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    answers = [traced.get("/v1/models", headers=unsampled)]
    answers += [traced.get(path) for path in ("/live", "/ready", "/health", "/metrics", "/")]
    assert {one.status_code for one in answers} == {200}
    assert collector.of(traced.get("/version")).name == "GET /version"  # spans come in their order
    unsent = {one.headers["x-request-id"] for one in answers}
    assert not [one for one in collector.spans if plain(one)["gen_ai.request.id"] in unsent]


def test_clients_that_go_away_and_engines_that_die(traced: Running, collector: Collector) -> None:
    body = {**LONG, "max_tokens": 1900}
    span = collector.of(left(traced, PATH, body))
    assert plain(span)["gen_ai.response.finish_reasons"] == ["abort"] and span.status.code == Status.STATUS_CODE_UNSET
    span = collector.of(killed(traced, PATH, body))
    assert span.status.code == Status.STATUS_CODE_ERROR and plain(span)["error.type"] == "failed"
    until_answered(traced, PATH, {"prompt": "x", "max_tokens": 2})


def test_what_clients_wrote_is_in_no_trace(traced: Running, collector: Collector) -> None:
    """Of all the tests above."""
    collector.of(traced.get("/version"))
    assert collector.data and MARKER.encode() not in collector.data and b"sekret" not in collector.data


# --- without a collector ---


@pytest.fixture
def another() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_nothing_is_sent_without_an_endpoint(tiny_llama_dir: Path, another: Collector) -> None:
    """Whatever libraries make of the environment: FastAPI would send by itself."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": another.url.removesuffix("/v1/traces"),
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
    }
    with served(tiny_llama_dir, **variables) as (process, url):
        assert httpx.post(url + PATH, json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
    assert not another.paths


@pytest.mark.parametrize("listens", [False, True])
def test_a_collector_that_does_not_answer(tiny_llama_dir: Path, listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered, and the server ends."""
    before = set(threading.enumerate())
    monkeypatch.setattr(tracing, "_END_SECONDS", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        settings = ServerSettings(port=0, otlp_traces_endpoint=url)
        with serving(tiny_llama_dir, settings) as running:
            assert running.post(PATH, {"prompt": "x", "max_tokens": 2}).status_code == 200
        for thread in set(threading.enumerate()) - before:  # or they would tell of it behind the last test
            thread.join(60)


def test_the_program(tiny_llama_dir: Path, another: Collector) -> None:
    """What waits to be sent at the end is sent."""
    with served(tiny_llama_dir, "--otlp-traces-endpoint", another.url, OTEL_SERVICE_NAME="mine") as (process, url):
        answer = httpx.get(url + "/v1/models", timeout=60)
        process.send_signal(signal.SIGTERM)
        code, err = ended(process)
    assert code == 0 and "rror" not in err
    assert another.of(answer).name == "GET /v1/models"
    (resource,) = another.requests[-1].resource_spans
    assert "mine" in [one.value.string_value for one in resource.resource.attributes if one.key == "service.name"]


@pytest.mark.parametrize("missing", ["exporter.otlp.proto.http.trace_exporter", "sdk.trace.export"])
def test_without_the_extra(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:  # noqa: F811
    """Told before a model is looked for."""
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, f"opentelemetry.{missing}", None)  # type: ignore[arg-type]
    result = invoke("serve", "/no/such/model", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "otlp_traces_endpoint: needs OpenTelemetry" in result.err and "pip install 'octavo[otel]'" in result.err
