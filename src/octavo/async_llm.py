"""The asynchronous front door: `AsyncLLM`, with the engine on a thread of its own.

asyncio is imported where it is used: the command line iterates without it, and starts faster so.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from octavo.base_llm import BaseLLM, chat_options
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import RequestFailedError
from octavo.core.outputs import CacheExplanation, RequestOutput
from octavo.core.params import SamplingParams
from octavo.core.values import exact_record, exact_str

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from octavo.ask import AsyncAskRun
    from octavo.async_session import AsyncSession
    from octavo.core.ask_params import AskParams
    from octavo.core.margins import MarginsSpec
    from octavo.core.margins_params import MarginsParams
    from octavo.core.pooling import EmbeddingRequestOutput, PoolingParams, PoolingSpec
    from octavo.core.request import RequestSpec
    from octavo.frontend import Messages, Prompt, Request
    from octavo.margins import AsyncMarginsRun


_Written = TypeVar("_Written")
_MAX_WAITING = 60.0  # seconds that a request with a template of its own waits for its turn


def _unless_late(write: Callable[[], _Written], asked: float) -> _Written:
    if monotonic() - asked > _MAX_WAITING:
        raise RequestFailedError("too many chat templates are at work: the wait for a turn was too long")
    return write()


class _Inbox:
    """What the engine's thread gives to the queues of one event loop, which is woken once for all that a step gave.
    Held by the requests of that loop alone: what was put in for a loop that is closed goes with the last of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_woken = False

    def put(self, outputs: asyncio.Queue[Any], output: Any) -> None:
        self._items.append((outputs, output))
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_woken = False  # before: what comes from now on wakes it again
        while self._items:
            outputs, output = self._items.popleft()
            outputs.put_nowait(output)


class AsyncLLM(BaseLLM):
    """`LLM` for asyncio. Make it anywhere; call its methods from one or several event loops.

    Args and errors of the constructor are those of `LLM`; it blocks while the model loads.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        super().__init__(model, **config)
        self._inboxes: WeakValueDictionary[int, _Inbox] = WeakValueDictionary()  # by id of the loop, which it holds
        self._guests: tuple[int, ThreadPoolExecutor] | None = None
        # Questions over documents, by id: they are at work before the engine hears of them, and in several requests.
        self._asked: WeakValueDictionary[str, AsyncAskRun] = WeakValueDictionary()

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
        request = await asyncio.to_thread(self._frontend.make, prompt, params, request_id, priority)
        async with aclosing(self._follow(request)) as answer:
            async for output in answer:
                yield output

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> EmbeddingRequestOutput:
        """One prompt as one vector; see `LLM.embed`."""
        import asyncio

        from octavo.core.pooling import PoolingParams

        given = PoolingParams() if pooling_params is None else pooling_params
        spec = await asyncio.to_thread(self._pooling_spec, prompt, given, priority, "prompt", request_id)
        async with aclosing(self._outputs_of(spec)) as outputs:
            async for output in outputs:
                if isinstance(output, Exception):
                    raise output
                return self._embedding(spec, output)
        raise AssertionError("a request ends with an output")

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
        request = await asyncio.to_thread(self._frontend.make_beams, prompt, given, request_id, priority)
        async with aclosing(self._follow(request)) as answer:
            async for output in answer:
                yield output

    async def _follow(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request, yielding its outputs; if the caller goes away, it is ended."""
        read = self._frontend.reader(request)
        async with aclosing(self._outputs_of(request.spec)) as outputs:
            async for output in outputs:
                yield read(self._checked(output))

    async def _outputs_of(self, *specs: RequestSpec | MarginsSpec | PoolingSpec) -> AsyncGenerator[Any, None]:
        """What the engine gives of requests, up to the first error; if the caller goes away, they are ended."""
        import asyncio

        outputs: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        inbox = self._inboxes.setdefault(id(loop), _Inbox(loop))

        def deliver(output: Any) -> None:
            inbox.put(outputs, output)

        left = {spec.request_id for spec in specs}
        self._loop.add(specs, deliver)
        try:
            while left:
                output = await outputs.get()
                if isinstance(output, Exception):
                    yield output
                    return
                if output.finished:
                    left.discard(output.request_id)
                yield output
        finally:
            if left:
                self._loop.abort(left, deliver)

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
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through a chat template; see `generate`, and for the rest `LLM.chat`."""
        options = chat_options(add_generation_prompt, continue_final_message, tools, documents, variables)
        write = partial(self._frontend.chat_prompt, messages, chat_template, options, chat_template_kwargs)
        prompt = await self._written(chat_template, write)
        answer = self.generate(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in answer:
                yield output
        finally:
            await answer.aclose()

    async def _written(self, chat_template: str | None, write: Callable[[], _Written]) -> _Written:
        """What a function gives that renders a chat template: beside the event loop."""
        import asyncio

        if self._frontend.is_own_template(chat_template):
            return await asyncio.to_thread(write)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._guest_threads(), _unless_late, write, monotonic())

    def _guest_threads(self) -> ThreadPoolExecutor:
        """A template that comes with a request may take all the time that one has: nobody else is to stand behind it.
        They end when this object is forgotten; a forked child has none of its parent's."""
        if self._guests is None or self._guests[0] != os.getpid():
            self._guests = os.getpid(), ThreadPoolExecutor(2, "octavo-templates")
        return self._guests[1]

    async def margins(
        self,
        document: str,
        question: str | Sequence[str],
        params: MarginsParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncMarginsRun:
        """Read a document with notes in its margins; see `LLM.margins`, and for what comes while it is read
        `LLM.stream_margins`::

            run = await llm.margins(document, question)
            async for event in run: ...
        """
        from octavo.margins import AsyncMarginsRun

        make = partial(
            self._margins_request,
            document,
            question,
            params,
            request_id=request_id,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            priority=priority,
            cache_salt=cache_salt,
        )
        request = await self._written(chat_template, make)
        return AsyncMarginsRun(self._loop, self._frontend, request, self._outputs_of(request.spec))

    async def ask(
        self,
        question: str,
        docs: str | Path | None = None,
        params: AskParams | None = None,
        request_id: str | None = None,
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        index_path: str | Path | None = None,
        update_index: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncAskRun:
        """Answer a question from documents; see `LLM.ask`, and for what comes meanwhile `LLM.stream_ask`::

        run = await llm.ask(question, "folder")
        async for event in run: ...
        """
        from octavo.ask import AsyncAskRun
        from octavo.ask_request import AskOptions

        self._loop.check_open()
        make = partial(
            AsyncAskRun,
            self._loop,
            self._frontend,
            question,
            params,
            docs=docs,
            documents=documents,
            index_path=index_path,
            update_index=update_index,
            request_id=request_id,
            options=AskOptions(chat_template, chat_template_kwargs, priority, cache_salt),
            outputs_of=self._outputs_of,
        )
        run = await self._written(chat_template, make)
        self._asked[run.request_id] = run
        return run

    def session(self, *, seed: int | None = None, priority: int = 0, cache_salt: str | None = None) -> AsyncSession:
        """See `LLM.session`: the same verbs, awaitable. ``async with llm.session() as s: await s.extend(text)``"""
        from octavo.async_session import AsyncSession

        return AsyncSession(self._begin_session(seed, priority, cache_salt))

    async def explain_cache(self, prompt: Prompt) -> CacheExplanation:
        """See `LLM.explain_cache`."""
        import asyncio

        token_ids, salt = await asyncio.to_thread(self._frontend.cache_key, prompt)
        return await asyncio.wrap_future(self._loop.explain_cache(token_ids, salt))

    async def reset_prefix_cache(self) -> int:
        """See `LLM.reset_prefix_cache`."""
        import asyncio

        return await asyncio.wrap_future(self._loop.reset_prefix_cache())

    async def abort(self, request_id: str) -> None:
        """End a request; whoever iterates over it gets a last output with finish_reason "abort". An id that nobody has
        is no error: it may have ended. Raises InvalidRequestError for what is no string."""
        request_id = exact_str("request_id", request_id)
        if (run := self._asked.get(request_id)) is not None:
            run.stop()
        self._loop.abort([request_id])

    def figures(self) -> dict[str, Any]:
        """What the engine does now: requests running and waiting, steps, KV blocks, counters of KV (`cache_stats`)."""
        return self._engine.figures()

    @property
    def num_unfinished_requests(self) -> int:
        return self._engine.num_requests

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        import asyncio

        await asyncio.to_thread(self.close)
