"""The asynchronous front door: `AsyncLLM`, with the engine on a thread of its own.

asyncio is imported where it is used: the command line iterates without it, and starts faster so.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.build import build_engine
from octavo.config import EngineConfig
from octavo.coordinators import SessionCoordinator
from octavo.coordinators.session import BranchState
from octavo.core.beam_params import BeamSearchParams
from octavo.core.coordinator import Coordinator
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.core.outputs import CacheExplanation, CacheStats, RequestOutput
from octavo.core.params import SamplingParams
from octavo.engine import Engine
from octavo.frontend import ChatPrompt, Messages, Prompt, cache_salt, make_frontend

if TYPE_CHECKING:
    import asyncio

    from octavo.async_session import AsyncSession

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Command = Callable[[Engine], None]
Deliver = Callable[[RequestOutput | Exception], None]


class AsyncLLM:
    """`LLM` for asyncio. Make it anywhere; call its methods from one or several event loops.

    Args and errors of the constructor are those of `LLM`; it blocks while the model loads.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        self.config = EngineConfig.resolve({"model": model, **config})
        built = build_engine(self.config)
        self._frontend = make_frontend(self.config, built)
        self.tokenizer = built.codec
        self.model_config = built.model_config
        self.memory_plan = built.memory_plan
        self.max_model_len = built.max_model_len
        self.system_fingerprint = built.system_fingerprint
        self._loop = _EngineLoop(built.engine)
        # An AsyncLLM that is forgotten, not closed, must not leave its thread and its memory behind.
        self._finalizer = weakref.finalize(self, self._loop.close)

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

        params = sampling_params if sampling_params is not None else SamplingParams()
        # Tokenising a long prompt takes a while: not on the event loop.
        coordinator = await asyncio.to_thread(self._frontend.make, prompt, params, request_id, priority)
        async with aclosing(self._follow(coordinator)) as answer:
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

        given = params if params is not None else BeamSearchParams()
        coordinator = await asyncio.to_thread(self._frontend.make_beams, prompt, given, request_id, priority)
        async with aclosing(self._follow(coordinator)) as answer:
            async for output in answer:
                yield output

    async def _follow(self, coordinator: Coordinator) -> AsyncGenerator[RequestOutput, None]:
        """Run a request, yielding its outputs; if the caller goes away, it is ended."""
        import asyncio

        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(output: RequestOutput | Exception) -> None:
            with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        self._loop.add(coordinator, deliver)
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = isinstance(output, Exception) or output.finished
                yield self._checked(output)
        finally:
            if not finished:
                self._loop.abort(coordinator.request_id, deliver)

    def stream(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None = None, *, priority: int = 0
    ) -> Generator[RequestOutput, None, None]:
        """`LLM.stream`, with the steps on the engine's thread: an interrupt of the caller's never breaks into them."""
        if isinstance(params, BeamSearchParams):
            coordinator: Coordinator = self._frontend.make_beams(prompt, params, priority=priority)
        else:
            coordinator = self._frontend.make(prompt, params or SamplingParams(), priority=priority)
        outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        deliver = outputs.put
        self._loop.add(coordinator, deliver)
        finished = False
        try:
            while not finished:
                output = outputs.get()
                finished = isinstance(output, Exception) or output.finished
                yield self._checked(output)
        finally:
            if not finished:
                self._loop.abort(coordinator.request_id, deliver)

    def _checked(self, output: RequestOutput | Exception) -> RequestOutput:
        if isinstance(output, Exception):
            raise output
        if output.error is not None:
            raise RequestFailedError(output.error)
        return self._frontend.name_tokens(output)

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
        """Answer a conversation through the model's chat template; see `generate` and `LLM.chat_prompt`."""
        import asyncio

        prompt = await asyncio.to_thread(self._frontend.chat_prompt, messages, chat_template, options)
        answer = self.generate(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in answer:
                yield output
        finally:
            await answer.aclose()

    def chat_prompt(self, messages: Messages, *, chat_template: str | None = None, **options: Any) -> ChatPrompt:
        """The prompt that `chat` answers: see `LLM.chat_prompt`. Not for the event loop: a long one takes a while."""
        return self._frontend.chat_prompt(messages, chat_template, options)

    def session(self, *, seed: int | None = None, priority: int = 0, cache_salt: str | None = None) -> AsyncSession:
        """See `LLM.session`: the same verbs, awaitable. ``async with llm.session() as s: await s.extend(text)``"""
        from octavo.async_session import AsyncSession

        coordinator = self._frontend.make_session(seed, priority, cache_salt)
        self._loop.post(lambda engine: engine.add(coordinator))
        return AsyncSession(_SessionDoor(self), self._frontend, coordinator)

    async def explain_cache(self, prompt: Prompt) -> CacheExplanation:
        """See `LLM.explain_cache`."""
        import asyncio

        _, token_ids = await asyncio.to_thread(self._frontend.tokens_of, prompt)
        salt = cache_salt(prompt)
        return await self._loop.ask(lambda engine: engine.explain_cache(token_ids, salt))

    async def reset_prefix_cache(self) -> int:
        """See `LLM.reset_prefix_cache`."""
        return await self._loop.ask(lambda engine: engine.reset_prefix_cache())

    @property
    def cache_stats(self) -> CacheStats:
        """See `LLM.cache_stats`."""
        return self._loop.cache_stats

    async def abort(self, request_id: str) -> None:
        """End a request; whoever iterates over it gets a last output with finish_reason "abort"."""
        self._loop.abort(request_id)

    @property
    def num_unfinished_requests(self) -> int:
        return self._loop.num_requests

    def close(self) -> None:
        """End all requests with EngineClosedError and stop the thread. Idempotent."""
        self._finalizer()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        import asyncio

        await asyncio.to_thread(self.close)


class _SessionDoor:
    """The way from a session to its engine: implements `octavo.async_session.AsyncDoor`."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm  # which is not to be forgotten while a session lives

    def in_session(self, coordinator: SessionCoordinator, verb: Callable[[], Answer]) -> Awaitable[Answer]:
        def question(engine: Engine) -> Answer:
            try:
                return verb()
            finally:
                engine.settle(coordinator)

        return self._llm._loop.ask(question)

    def post_in_session(self, coordinator: SessionCoordinator, verb: Callable[[], None]) -> None:
        def command(engine: Engine) -> None:
            verb()
            engine.settle(coordinator)

        with suppress(EngineClosedError):  # then it has ended already
            self._llm._loop.post(command)

    async def end_session(self, coordinator: SessionCoordinator) -> None:
        with suppress(EngineClosedError):
            await self._llm._loop.ask(lambda engine: engine.abort(coordinator.request_id))

    def forget(self, coordinator: SessionCoordinator, branch: BranchState | None) -> None:
        def command(engine: Engine) -> None:
            if branch is None:
                engine.abort(coordinator.request_id)
            else:
                coordinator.drop_branch(branch)
                engine.settle(coordinator)

        self._llm._loop.post_unlocked(command)


class _EngineLoop:
    """The thread that owns an engine: takes commands between steps and hands outputs to whoever waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._closed = False
        self._lock = threading.Lock()  # between closing and adding: no request slips in behind the last command
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        return self._engine.num_requests

    def add(self, coordinator: Coordinator, deliver: Deliver) -> None:
        def command(engine: Engine) -> None:
            if coordinator.request_id in self._deliver:
                deliver(InvalidRequestError("request_id", f"{coordinator.request_id!r} is in use"))
                return
            self._deliver[coordinator.request_id] = deliver
            engine.add(coordinator)

        self._send(command)

    def abort(self, request_id: str, owner: Deliver | None = None) -> None:
        """With `owner`: only the request that delivers to it, and not another one with the same id."""

        def command(engine: Engine) -> None:
            if owner is not None and self._deliver.get(request_id) is not owner:
                return
            output = engine.abort(request_id)
            if output is not None:
                self._hand_out(output)

        with suppress(EngineClosedError):  # then it has ended already
            self._send(command)

    @property
    def cache_stats(self) -> CacheStats:
        return replace(self._engine.kv.stats)

    def post(self, command: Command) -> None:
        """Have a command carried out between two steps; it must not raise. Raises EngineClosedError."""
        self._send(command)

    def post_unlocked(self, command: Command) -> None:
        """The same for a finalizer, which may run while its thread holds the lock. Lost if the engine was closed."""
        self._commands.put(command)

    async def ask(self, question: Callable[[Engine], Answer]) -> Answer:
        """The answer to a question that the engine's thread puts between two steps. Raises EngineClosedError."""
        import asyncio

        answer: Future[Answer] = Future()

        def command(engine: Engine) -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question(engine))
                except Exception as error:
                    answer.set_exception(error)

        self._send(command)
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Command) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError("this AsyncLLM is closed")
            self._commands.put(command)

    def _run(self) -> None:
        error = EngineClosedError("the engine was closed before the request ended")
        try:
            while self._obey():
                for output in self._engine.step():
                    self._hand_out(output)
        except Exception as failure:
            log.exception("the engine's thread died")
            error = EngineClosedError(f"the engine died: {failure!r}")
            with self._lock:
                self._closed = True
            self._obey_the_rest()
        for deliver in self._deliver.values():
            deliver(error)
        self._deliver.clear()
        self._engine.close()

    def _obey(self) -> bool:
        """Carry out what was asked since the last step, waiting while there is nothing to do. False: end."""
        while True:
            idle = not self._engine.has_unfinished_requests
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(self._engine)

    def _obey_the_rest(self) -> None:
        """After a failure: whoever has asked for something in the meantime must hear of it and not wait for ever."""
        with suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    with suppress(Exception):
                        command(self._engine)

    def _hand_out(self, output: RequestOutput) -> None:
        deliver = self._deliver.get(output.request_id)
        if deliver is not None:
            if output.finished:
                del self._deliver[output.request_id]
            deliver(output)
