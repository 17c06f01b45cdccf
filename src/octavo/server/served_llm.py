"""`AsyncLLM` with its engine in a process of its own: this one checks, tokenises and streams."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, Protocol

from octavo.async_llm import AsyncLLM
from octavo.core.outputs import CacheStats
from octavo.core.proposer import SpeculationStats
from octavo.frontend import Frontend
from octavo.server.metrics import Metrics
from octavo.server.records import current_record
from octavo.server.remote import HANG_SECONDS, EngineOptions, RemoteEngine
from octavo.text.model_tokens import ModelTokens
from octavo.wiring import text_of


class Watch(Protocol):
    """Looks at one request as its outputs go by."""

    def take(self, output: Any) -> None: ...

    def end(self, reason: str) -> None:
        """It has ended, or if it had not before, it does for this reason."""
        ...


class ServedLLM(AsyncLLM):
    """See the module. Args and errors are those of `AsyncLLM`; `hang_seconds` and `options` are those of
    RemoteEngine."""

    def __init__(
        self,
        model: str | None = None,
        *,
        hang_seconds: float = HANG_SECONDS,
        options: EngineOptions | None = None,
        **config: Any,
    ) -> None:
        self._hang_seconds = hang_seconds
        self._options = options
        self.metrics: Metrics | None = None  # told of every request, once there is one
        self.tell_request: Callable[[Any], None] | None = None  # likewise
        super().__init__(model, **config)

    def _open(self) -> None:
        engine = RemoteEngine(asdict(self.config), self._hang_seconds, self._options)
        try:
            self.tokenizer, self._generation_config = text_of(self.config.model)
            limits = engine.ready.limits
            tokens = ModelTokens(self.tokenizer, limits.vocab_size)
            self.system_fingerprint = engine.ready.system_fingerprint
            self._frontend = Frontend(self.tokenizer, tokens, limits, self.system_fingerprint, time.monotonic)
            self.max_model_len = limits.max_model_len
            self.hidden_size = engine.ready.hidden_size
        except BaseException:
            engine.close()
            raise
        self._loop = self.engine = engine
        self._finalizer = weakref.finalize(self, engine.close)

    async def _outputs_of(self, *specs: Any) -> AsyncGenerator[Any, None]:
        watches = {spec.request_id: self._watch(spec) for spec in specs}
        try:
            async with aclosing(super()._outputs_of(*specs)) as outputs:
                async for output in outputs:
                    for watch in watches[getattr(output, "request_id", specs[0].request_id)]:
                        watch.take(output)
                    yield output
        finally:
            for watched in watches.values():
                for watch in watched:
                    watch.end("abort")

    def _watch(self, spec: Any) -> list[Watch]:
        """Who looks at what the engine gives of a request."""
        if self.tell_request is not None:
            self.tell_request(spec)
        watches: list[Watch] = [] if self.metrics is None else [self.metrics.watch(spec)]
        record = current_record.get()
        return watches if record is None else [*watches, record.watch(spec)]

    def figures(self) -> dict[str, Any]:
        """Of the engine's last sign of life, and how often it was started again."""
        return {**self.engine.figures, "restarts": self.engine.num_restarts}

    async def timeline(self, seconds: float) -> bytes:
        """What the engine did lately, for `octavo.server.timeline.chrome_trace`. Raises RequestFailedError if nobody
        keeps it."""
        return await asyncio.wrap_future(self.engine.timeline(seconds))

    @property
    def cache_stats(self) -> CacheStats:
        """As of the engine's last sign of life."""
        return replace(self.engine.figures.get("stats", CacheStats()))

    @property
    def speculation_stats(self) -> SpeculationStats | None:
        """As of the engine's last sign of life."""
        stats: SpeculationStats | None = self.engine.figures.get("speculation")
        return None if stats is None else stats.copy()

    @property
    def num_unfinished_requests(self) -> int:
        return len(self.engine._requests)
