"""What is known of a request over HTTP once it was answered: for its line in the log, and its span.

The record of the request at hand is in a context variable, which tasks and threads that work for it inherit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any

from octavo.core.margins import AnswerDelta, MarginsOutput
from octavo.core.outputs import CompletionOutput, RequestMetrics
from octavo.core.pooling import PoolingOutput
from octavo.server.logs import with_fields

log = logging.getLogger("octavo.server.requests")
current_record: ContextVar[RequestRecord | None] = ContextVar("octavo_record", default=None)


@dataclass(slots=True)
class RequestRecord:
    """Of one request. One of HTTP may be several of the engine's: times are those of the earliest, counts of all."""

    method: str
    path: str
    began: float = field(default_factory=time.monotonic)
    request_id: str = ""
    route: str | None = None  # its template, ``/v1/models/{model}``; None: there is no such route
    status: int | None = None  # None: no answer was begun
    failed: bool = False  # the answer was an error after it had begun
    duration: float = 0.0  # seconds
    trace_id: str | None = None
    model: str | None = None  # by the name that the answer carries
    specs: list[Any] = field(default_factory=list)  # of the engine's requests
    finish_reasons: dict[str, None] = field(default_factory=dict)  # each once
    turn_tokens: int | None = None  # generated in a session
    metrics: dict[str, RequestMetrics] = field(default_factory=dict)  # the latest, by the engine's id

    def watch(self, spec: Any) -> RecordWatch:
        """One of the engine's requests."""
        self.specs.append(spec)
        return RecordWatch(self)

    def take_turns(self, outputs: Iterable[CompletionOutput]) -> None:
        """What branches of a session have generated."""
        for one in outputs:
            self.turn_tokens = (self.turn_tokens or 0) + len(one.token_ids)
            if one.finish_reason is not None:
                self.finish_reasons[one.finish_reason] = None

    @property
    def asked_engine(self) -> bool:
        """For text or vectors."""
        return bool(self.specs) or self.turn_tokens is not None

    # --- of the engine's requests; None where there was none ---

    @property
    def prompt_tokens(self) -> int | None:
        return sum(map(num_prompt_tokens, self.specs)) if self.specs else None

    @property
    def cached_tokens(self) -> int | None:
        return sum(one.num_cached_tokens for one in self.metrics.values()) if self.metrics else None

    @property
    def generated_tokens(self) -> int | None:
        counts = [one.num_generated_tokens for one in self.metrics.values()]
        return sum(counts, self.turn_tokens or 0) if counts or self.turn_tokens is not None else None

    @property
    def num_preemptions(self) -> int | None:
        return sum(one.num_preemptions for one in self.metrics.values()) if self.metrics else None

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step."""
        return _between(self._first("arrival_time"), self._first("first_scheduled_time"))

    @property
    def time_to_first_token(self) -> float | None:
        return _between(self._first("arrival_time"), self._first("first_token_time"))

    @property
    def prefill_time(self) -> float | None:
        """Seconds from the first step to the first token."""
        return _between(self._first("first_scheduled_time"), self._first("first_token_time"))

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the end."""
        return _between(self._first("first_token_time"), self._last("finished_time"))

    @property
    def inference_time(self) -> float | None:
        """Seconds from the first step to the end."""
        return _between(self._first("first_scheduled_time"), self._last("finished_time"))

    def _first(self, name: str) -> float | None:
        return min(self._times(name), default=None)

    def _last(self, name: str) -> float | None:
        return max(self._times(name), default=None)

    def _times(self, name: str) -> Iterable[float]:
        return (at for one in self.metrics.values() if (at := getattr(one, name)) is not None)

    @property
    def is_error(self) -> bool:
        """Whether it failed by no fault of the client's."""
        return self.failed or (self.status is not None and self.status >= 500)

    # --- the log ---

    def tell(self, level: int) -> None:
        """The line that each request has. Without what the client has written, but for a path that no route has."""
        if not log.isEnabledFor(level):
            return
        log.log(
            level,
            "answered",
            extra=with_fields(
                request_id=self.request_id,
                method=self.method,
                route=self.route,
                path=self.path[:200] if self.route is None else None,
                status=self.status,
                failed=self.failed or None,
                duration=self.duration,
                model=self.model,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                generated_tokens=self.generated_tokens,
                finish_reason=",".join(self.finish_reasons) or None,
                queue_time=self.queue_time,
                time_to_first_token=self.time_to_first_token,
                trace_id=self.trace_id,
            ),
        )


class RecordWatch:
    """One of the engine's requests, as its outputs go by."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._ended = False

    def take(self, output: Any) -> None:
        if isinstance(output, Exception):
            self.end("error")
            return
        self._record.metrics[output.request_id] = output.metrics
        for one in completions_of(output):
            if one.finish_reason is not None:
                self._record.finish_reasons[one.finish_reason] = None
        self._ended = output.finished

    def end(self, reason: str) -> None:
        """Idempotent."""
        if not self._ended:
            self._ended = True
            self._record.finish_reasons[reason] = None


def completions_of(output: Any) -> list[Any]:
    """What an output of the engine's tells of texts."""
    if isinstance(output, PoolingOutput):
        return []
    if isinstance(output, MarginsOutput):
        return [event.output for event in output.events if isinstance(event, AnswerDelta)]
    return list(output.outputs)


def num_prompt_tokens(spec: Any) -> int:
    """Of a request to the engine."""
    if hasattr(spec, "prompt_token_ids"):
        return len(spec.prompt_token_ids)
    return len(spec.prefix) + len(spec.document)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def request_teller(decode: Callable[[list[int]], str], most: int | None) -> Callable[[Any], None]:
    """For --enable-log-requests: tells prompt and parameters of a request to the engine. `most`: characters."""

    def tell(spec: Any) -> None:
        token_ids = getattr(spec, "prompt_token_ids", None)
        prompt = decode(list(spec.document if token_ids is None else token_ids))
        params = {name: _told(getattr(spec, name, None)) for name in ("params", "beams", "margin", "answer")}
        given = {name: value for name, value in params.items() if value}
        _tell_received(
            engine_id=spec.request_id, prompt_tokens=num_prompt_tokens(spec), prompt=cut(prompt, most), **given
        )

    return tell


def tell_turn(session: str, verb: str, given: Mapping[str, Any], most: int | None) -> None:
    """The same of what is asked of a session."""
    _tell_received(session=session, verb=verb, params={name: cut(str(value), most) for name, value in given.items()})


def _tell_received(**fields: Any) -> None:
    log.info("received", extra=of_request(**fields))


def of_request(**fields: Any) -> dict[str, Any]:
    """`extra` of a record: which request it is about, and these fields."""
    record = current_record.get()
    return with_fields(request_id=None if record is None else record.request_id, **fields)


def cut(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[:most] + "..."


def _told(params: Any) -> dict[str, Any]:
    """Those of its fields that are not at their defaults."""
    params = getattr(params, "params", params)  # of a RequestSpec
    if params is None:
        return {}
    default = type(params)()
    values = {one.name: getattr(params, one.name) for one in fields(params)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}
