"""Spans of requests for OpenTelemetry, sent to the endpoint that is configured, and nothing without one.

One span a request over HTTP, with what OpenTelemetry's conventions say of HTTP and of generative AI, and under the
names that vLLM uses. What the client has written is in none. OTEL_* variables of the SDK hold: OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import ConfigError
from octavo.core.request import RequestSpec

if TYPE_CHECKING:
    from starlette.types import Scope

    from octavo.server.records import RequestRecord

_END_SECONDS = 5.0  # for what waits to be sent, at the end
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/octavo/beam_search": "text_completion",
    "/v1/embeddings": "embeddings",
}
_TAKEN = b"traceparent", b"tracestate"


def check_packages() -> None:
    """Raises ConfigError where OpenTelemetry is not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        problem = f"needs OpenTelemetry ({error.name} is missing): pip install 'octavo[otel]'"
        raise ConfigError(f"otlp_traces_endpoint: {problem}") from None


class Tracing:
    """Of one server. Raises ConfigError where OpenTelemetry is not installed."""

    def __init__(self, endpoint: str) -> None:
        check_packages()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._kind, self._error = SpanKind.SERVER, StatusCode.ERROR
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "octavo"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("octavo", __version__)

    def begin(self, scope: Scope, record: RequestRecord) -> Any:
        """A span that begins now, in the trace that the request is part of, if it says so."""
        carrier: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name in _TAKEN:
                carrier[name.decode()] = value.decode("latin-1")
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(record.method, parent, kind=self._kind, start_time=time.time_ns())
        if span.get_span_context().is_valid:
            record.trace_id = f"{span.get_span_context().trace_id:032x}"
        return span

    def end(self, span: Any, record: RequestRecord) -> None:
        """It ends now."""
        if span.is_recording():
            told = of_http(record) | (of_engine(record) if record.asked_engine else {})
            span.set_attributes({name: value for name, value in told.items() if value is not None})
            span.update_name(span_name(record))
            if record.is_error:
                span.set_status(self._error)
        span.end()

    def close(self) -> None:
        """What waits is sent, if that does not take long. It may block."""
        closing = threading.Thread(target=self._provider.shutdown, name="octavo-traces-end", daemon=True)
        closing.start()
        closing.join(_END_SECONDS)
        if closing.is_alive():  # nobody answers: it would be tried again and again
            self._exporter.shutdown()


def span_name(record: RequestRecord) -> str:
    if record.asked_engine:
        return f"{_operation(record)} {record.model}"
    return record.method if record.route is None else f"{record.method} {record.route}"


def _operation(record: RequestRecord) -> str:
    return _OPERATIONS.get(record.route or "", "generate_content")


def of_http(record: RequestRecord) -> dict[str, Any]:
    failure = str(record.status) if record.status is not None and record.status >= 500 else "failed"
    return {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": failure if record.is_error else None,
        "gen_ai.request.id": record.request_id,
    }


def of_engine(record: RequestRecord) -> dict[str, Any]:
    """Tokens and times. https://github.com/open-telemetry/semantic-conventions-genai, and vLLM's SpanAttributes."""
    told = {
        "gen_ai.operation.name": _operation(record),
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": list(record.finish_reasons) or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.generated_tokens,
        "gen_ai.usage.completion_tokens": record.generated_tokens,
        "gen_ai.latency.time_in_queue": record.queue_time,
        "gen_ai.latency.time_to_first_token": record.time_to_first_token,
        "gen_ai.latency.time_in_model_prefill": record.prefill_time,
        "gen_ai.latency.time_in_model_decode": record.decode_time,
        "gen_ai.latency.time_in_model_inference": record.inference_time,
        "gen_ai.latency.e2e": record.duration,
        "octavo.num_preemptions": record.num_preemptions,
    }
    return told | (_of_params(record.specs[0]) if record.specs else {})


def _of_params(spec: Any) -> dict[str, Any]:
    """What was asked for, but for texts."""
    if not isinstance(spec, RequestSpec):
        return {}
    params = spec.params
    asked: dict[str, Any] = {"gen_ai.request.max_tokens": spec.max_tokens}
    if isinstance(spec.beams, BeamSearchParams):
        width = spec.beams.num_outputs
        return {**asked, "gen_ai.request.n": width, "gen_ai.request.choice.count": width}
    for name in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty"):
        asked[f"gen_ai.request.{name}"] = getattr(params, name)
    return {
        **asked,
        "gen_ai.request.seed": spec.seed,
        "gen_ai.request.n": params.n,
        "gen_ai.request.choice.count": params.n,
    }
