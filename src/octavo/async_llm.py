"""The asynchronous front door: `AsyncLLM`, with the engine on a thread of its own.

asyncio is imported where it is used: the command line iterates without it, and starts faster so.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from octavo.build import build_engine
from octavo.config import EngineConfig
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import RequestFailedError
from octavo.core.outputs import CacheExplanation, CacheStats, RequestOutput
from octavo.core.params import OutputKind, SamplingParams
from octavo.core.values import exact_record, exact_str

if TYPE_CHECKING:
    import asyncio

    from octavo.async_session import AsyncSession
    from octavo.core.coordinator import Coordinator
    from octavo.frontend import ChatPrompt, Messages, Prompt


_MAX_WAITING = 60.0  # seconds that a request with a template of its own waits for its turn


def _unless_late(write: Callable[[], ChatPrompt], asked: float) -> ChatPrompt:
    if monotonic() - asked > _MAX_WAITING:
        raise RequestFailedError("too many chat templates are at work: the wait for a turn was too long")
    return write()


class AsyncLLM:
    """`LLM` for asyncio. Make it anywhere; call its methods from one or several event loops.

    Args and errors of the constructor are those of `LLM`; it blocks while the model loads.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        self.config = EngineConfig.resolve({"model": model, **config})
        built = build_engine(self.config)
        self._frontend = built.frontend
        self.tokenizer = built.tokenizer
        self.model_config = built.model_config
        self.memory_plan = built.memory_plan
        self.max_model_len = built.max_model_len
        self.system_fingerprint = built.system_fingerprint
        self._generation_config = built.generation_config
        self._loop = built.start()
        # An AsyncLLM that is forgotten, not closed, must not leave its thread and its memory behind.
        self._finalizer = weakref.finalize(self, self._loop.close)
        self._guests: tuple[int, ThreadPoolExecutor] | None = None

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one prompt, yielding as tokens come; `output_kind` says whether all so far, only what is new, or the
        final state.

        Cancelling the task or closing the iterator ends the request and frees its blocks.

        Raises InvalidRequestError naming the field at fault, RequestFailedError if the request failed inside the
        engine, EngineClosedError if the engine was closed.
        """
        import asyncio

        given = SamplingParams() if sampling_params is None else sampling_params
        params = exact_record("sampling_params", given, SamplingParams)
        # Tokenising a long prompt takes a while: not on the event loop.
        coordinator = await asyncio.to_thread(self._frontend.make, prompt, params, request_id, priority)
        async with aclosing(self._follow(coordinator, params.output_kind)) as answer:
            async for output in answer:
                yield output

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Search one prompt's most probable continuations; see `LLM.beam_search` and, for what is yielded,
        `LLM.stream`."""
        import asyncio

        given = BeamSearchParams() if params is None else exact_record("params", params, BeamSearchParams)
        coordinator = await asyncio.to_thread(self._frontend.make_beams, prompt, given, request_id, priority)
        async with aclosing(self._follow(coordinator, given.output_kind)) as answer:
            async for output in answer:
                yield output

    async def _follow(self, coordinator: Coordinator, kind: OutputKind | str) -> AsyncGenerator[RequestOutput, None]:
        """Run a request, yielding its outputs; if the caller goes away, it is ended."""
        import asyncio

        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        read = self._frontend.reader(kind)

        def deliver(output: RequestOutput | Exception) -> None:
            with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        self._loop.add([coordinator], deliver)
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = isinstance(output, Exception) or output.finished
                yield read(self._checked(output))
        finally:
            if not finished:
                self._loop.abort([coordinator.request_id], deliver)

    @staticmethod
    def _checked(output: RequestOutput | Exception) -> RequestOutput:
        if isinstance(output, Exception):
            raise output
        if output.error is not None:
            raise RequestFailedError(output.error)
        return output

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        chat_template: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through a chat template; see `generate` and, for the options, `LLM.chat_prompt`."""
        import asyncio

        write = partial(self._frontend.chat_prompt, messages, chat_template, options)
        if self._frontend.is_own_template(chat_template):
            prompt = await asyncio.to_thread(write)
        else:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._guest_threads(), _unless_late, write, monotonic())
        answer = self.generate(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in answer:
                yield output
        finally:
            await answer.aclose()

    def _guest_threads(self) -> ThreadPoolExecutor:
        """A template that comes with a request may take all the time that one has: nobody else is to stand behind it.
        They end when this object is forgotten; a forked child has none of its parent's."""
        if self._guests is None or self._guests[0] != os.getpid():
            self._guests = os.getpid(), ThreadPoolExecutor(2, "octavo-templates")
        return self._guests[1]

    def chat_prompt(self, messages: Messages, *, chat_template: str | None = None, **options: Any) -> ChatPrompt:
        """The prompt that `chat` answers: see `LLM.chat_prompt`. Not for the event loop: a long one takes a while."""
        return self._frontend.chat_prompt(messages, chat_template, options)

    def session(self, *, seed: int | None = None, priority: int = 0, cache_salt: str | None = None) -> AsyncSession:
        """See `LLM.session`: the same verbs, awaitable. ``async with llm.session() as s: await s.extend(text)``"""
        from octavo.async_session import AsyncSession
        from octavo.session import Door

        coordinator = self._frontend.make_session(seed, priority, cache_salt)
        self._loop.add_session(coordinator)
        return AsyncSession(Door(self, self._loop), self._frontend, coordinator)

    async def explain_cache(self, prompt: Prompt) -> CacheExplanation:
        """See `LLM.explain_cache`."""
        import asyncio

        token_ids, salt = await asyncio.to_thread(self._frontend.cache_key, prompt)
        return await asyncio.wrap_future(self._loop.ask(lambda engine: engine.explain_cache(token_ids, salt)))

    async def reset_prefix_cache(self) -> int:
        """See `LLM.reset_prefix_cache`."""
        import asyncio

        return await asyncio.wrap_future(self._loop.ask(lambda engine: engine.reset_prefix_cache()))

    @property
    def generation_config(self) -> dict[str, Any]:
        """See `LLM.generation_config`."""
        return self._generation_config()

    @property
    def cache_stats(self) -> CacheStats:
        """See `LLM.cache_stats`."""
        return replace(self._loop.engine.kv.stats)

    async def abort(self, request_id: str) -> None:
        """End a request; whoever iterates over it gets a last output with finish_reason "abort". An id that nobody has
        is no error: it may have ended. Raises InvalidRequestError for what is no string."""
        self._loop.abort([exact_str("request_id", request_id)])

    @property
    def num_unfinished_requests(self) -> int:
        return self._loop.engine.num_requests

    def close(self) -> None:
        """End all requests with EngineClosedError and stop the thread. Idempotent."""
        self._finalizer()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        import asyncio

        await asyncio.to_thread(self.close)
