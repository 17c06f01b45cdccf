"""`AsyncLLM` with its engine in a process of its own: this one checks, tokenises and streams."""

from __future__ import annotations

import time
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.core.outputs import CacheStats
from octavo.frontend import Frontend
from octavo.server.metrics import Metrics
from octavo.server.remote import HANG_SECONDS, RemoteEngine
from octavo.text.model_tokens import ModelTokens
from octavo.wiring import text_of


class ServedLLM(AsyncLLM):
    """See the module. Args and errors are those of `AsyncLLM`; `hang_seconds` are those of RemoteEngine."""

    def __init__(self, model: str | None = None, *, hang_seconds: float = HANG_SECONDS, **config: Any) -> None:
        self._hang_seconds = hang_seconds
        self.metrics: Metrics | None = None  # told of every request, once there is one
        super().__init__(model, **config)

    def _open(self) -> None:
        engine = RemoteEngine(asdict(self.config), self._hang_seconds)
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
        metrics = self.metrics
        if metrics is None:
            watches = {}
        else:
            watches = {spec.request_id: metrics.watch(spec) for spec in specs}
        try:
            async with aclosing(super()._outputs_of(*specs)) as outputs:
                async for output in outputs:
                    watch = watches.get(getattr(output, "request_id", specs[0].request_id))
                    if watch is not None:
                        watch.take(output)
                    yield output
        finally:
            for watch in watches.values():
                watch.end("abort")

    def figures(self) -> dict[str, Any]:
        """Of the engine's last sign of life, and how often it was started again."""
        return {**self.engine.figures, "restarts": self.engine.num_restarts}

    @property
    def cache_stats(self) -> CacheStats:
        """As of the engine's last sign of life."""
        return replace(self.engine.figures.get("stats", CacheStats()))

    @property
    def num_unfinished_requests(self) -> int:
        return len(self.engine._requests)
