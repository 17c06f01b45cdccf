"""The thread that owns an engine: takes commands between steps, and hands outputs to whoever waits for them.

So callers may be many threads or event loops: commands are carried out in the order in which they came, nobody waits
longer for his turn than a step takes, and an interrupt of a caller never breaks into the engine's bookkeeping.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.core import engine_client
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.core.request import RequestSpec, SessionSpec
from octavo.engine.engine import Engine, Output

if TYPE_CHECKING:
    from octavo.core.engine_client import Deliver
    from octavo.core.margins import MarginsSpec
    from octavo.core.outputs import CacheExplanation
    from octavo.core.pooling import PoolingSpec

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Command = Callable[[Engine], None]

_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


class EngineLoop:
    """See the module. An `EngineClient` (octavo.core.engine_client): methods may be called from any thread, and by
    finalizers, which run at any moment in any.

    A fork of the process waits until no engine is in a step. In the child the requests under way end with
    EngineClosedError, since those who wait for them are in the parent; sessions and the cache live on in both.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.background = self
        self._deliver: dict[str, Deliver] = {}  # by request id
        self._ended: dict[str, Deliver] = {}  # the same of sessions
        self._closed: str | None = None  # why
        self._begin()
        _loops.add(self)

    def _begin(self) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        # Between closing and adding: no command slips in behind the last one. A finalizer may run in a thread that
        # holds it, so it must be one that a thread can take twice.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None  # started with the first command
        self._go_on = threading.Event()  # after a fork
        self._beside: ThreadPoolExecutor | None = None  # started with the first job

    @property
    def thread(self) -> threading.Thread | None:
        return self._thread

    # --- requests ---

    def add(self, requests: SequenceOf[RequestSpec | MarginsSpec | PoolingSpec], deliver: Deliver) -> None:
        """Queue requests, all before the next step. Each one's outputs go to `deliver`, the last one finished; or an
        error, after which nothing more comes of it. Raises EngineClosedError."""

        def command(engine: Engine) -> None:
            for request in requests:
                try:
                    engine.add_request(request)
                except InvalidRequestError as error:
                    self._tell(deliver, error)
                except BaseException as error:
                    log.exception("request %s could not be started", request.request_id)
                    self._tell(deliver, RequestFailedError(f"{type(error).__name__}: {error}"))
                else:
                    self._deliver[request.request_id] = deliver

        self.post(command)

    def add_session(self, session: SessionSpec, ended: Deliver) -> None:
        """The same of a session, whose only output is the last. It lives on in a forked child."""

        def command(engine: Engine) -> None:
            try:
                engine.add_request(session)
            except BaseException as error:
                log.exception("session %s could not be started", session.request_id)
                self._tell(ended, RequestFailedError(f"{type(error).__name__}: {error}"))
            else:
                self._ended[session.request_id] = ended

        self.post(command)

    def abort(self, request_ids: Iterable[str], owner: Deliver | None = None) -> None:
        """End requests that have not ended. With `owner`: only those that deliver to it, and not others with these ids.
        Does not wait for it; what is asked later comes after it."""

        def command(engine: Engine) -> None:
            for request_id in request_ids:
                if owner is None or self._deliver.get(request_id) is owner:
                    output = engine.abort(request_id)
                    if output is not None:
                        self._hand_out(output)

        with suppress(EngineClosedError):  # then they have ended already
            self.post(command)

    def run(self, requests: SequenceOf[RequestSpec | MarginsSpec | PoolingSpec]) -> Generator[Output, None, None]:
        """Add requests and yield their outputs as they come, until all are finished. Closing the generator ends those
        that are not. Raises EngineClosedError, or InvalidRequestError if one is refused."""
        self._check_caller()
        yield from engine_client.run(self, requests)

    # --- commands ---

    def post(self, command: Command) -> None:
        """Have a command carried out between two steps. What it raises is logged and nobody hears of it. Raises
        EngineClosedError."""
        with self._lock:
            self.check_open()
            self._commands.put(command)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
                self._thread.start()

    def ask(self, question: Callable[[Engine], Answer]) -> Future[Answer]:
        """The answer to a question that the engine's thread puts between two steps. Raises EngineClosedError."""
        self._check_caller()
        answer: Future[Answer] = Future()

        def command(engine: Engine) -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    result = question(engine)
                except BaseException as error:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)

        self.post(command)
        return answer

    def call(self, request_id: str, calls: SequenceOf[Any]) -> Future[list[Any]]:
        return self.ask(lambda engine: engine.call(request_id, calls))

    def take_back(self, request_id: str, calls: SequenceOf[Any]) -> Future[None]:
        return self.ask(lambda engine: engine.take_back(request_id, calls))

    def forget(self, request_id: str, call: Any) -> None:
        def command(engine: Engine) -> None:
            engine.call(request_id, [call])

        with suppress(EngineClosedError):  # then it has ended already
            self.post(command)

    def explain_cache(self, token_ids: SequenceOf[int], salt: str | None) -> Future[CacheExplanation]:
        return self.ask(lambda engine: engine.explain_cache(token_ids, salt))

    def reset_prefix_cache(self) -> Future[int]:
        return self.ask(lambda engine: engine.reset_prefix_cache())

    def cache_order(
        self, prefix: SequenceOf[int], parts: SequenceOf[SequenceOf[int]], salt: str | None
    ) -> Future[list[int]]:
        return self.ask(lambda engine: engine.cache_order(prefix, parts, salt))

    def submit(self, request_id: str, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """See `octavo.core.protocols.Background`: on a thread of its own. Called in the engine's thread."""

        def work() -> None:
            try:
                answer = job()
            except BaseException as error:  # a panic of Rust code
                answer = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
            with suppress(EngineClosedError):  # then the request has ended
                self.post(lambda engine: engine.resume(request_id, lambda: done(answer)))

        if self._beside is None:
            self._beside = ThreadPoolExecutor(1, "octavo-beside")
        self._beside.submit(work)

    def _check_caller(self) -> None:
        if threading.current_thread() is self._thread:  # in a finalizer of the user's
            raise RuntimeError("the engine's own thread cannot wait for the engine")

    def check_open(self) -> None:
        """Raises EngineClosedError."""
        if self._closed is not None:
            raise EngineClosedError(self._closed)

    def close(self) -> None:
        """End all requests, with EngineClosedError for whoever waits for them, and the thread. Idempotent."""
        with self._lock:
            closed, self._closed = self._closed, self._closed or "this LLM is closed"
            thread = self._thread
            if closed is None and thread is not None:
                self._commands.put(None)
        if thread is None:
            if closed is None:
                self.engine.close()
        elif thread is not threading.current_thread():
            thread.join()

    # --- the thread ---

    def _run(self) -> None:
        error = EngineClosedError("the engine was closed before the request ended")
        try:
            while self._obey():
                for output in self._step():
                    self._hand_out(output)
        except BaseException as failure:
            log.exception("the engine's thread died")
            error = EngineClosedError(f"the engine died: {failure!r}")
            with self._lock:
                self._closed = str(error)
            self._obey_the_rest()
        for deliver in self._deliver.values():
            self._tell(deliver, error)
        self._deliver.clear()
        if self._beside is not None:
            self._beside.shutdown(wait=False)
        self.engine.close()

    def _step(self) -> SequenceOf[Output]:
        """A step. One that raises ends the requests there are, since it is nobody's fault alone, but not the engine."""
        try:
            return self.engine.step()
        except BaseException as failure:
            log.exception("a step failed as a whole; all requests end")
            return self.engine.end_all(f"{type(failure).__name__}: {failure}")

    def _obey(self) -> bool:
        """Carry out what was asked since the last step, waiting while there is nothing to do. False: end."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_unfinished_requests)
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command(self.engine)
            except BaseException:
                log.exception("a command to the engine raised")
            for output in self.engine.take_outputs():
                self._hand_out(output)

    def _obey_the_rest(self) -> None:
        """After a failure: whoever has asked for something in the meantime must hear of it and not wait for ever."""
        with suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    with suppress(BaseException):
                        command(self.engine)

    def _hand_out(self, output: Output) -> None:
        ended = self._ended.pop(output.request_id, None)
        if ended is not None:
            self._tell(ended, output)
        deliver = self._deliver.get(output.request_id)
        if deliver is not None:
            if output.finished:
                del self._deliver[output.request_id]
            if not self._tell(deliver, output) and not output.finished:  # nobody hears of it any more
                del self._deliver[output.request_id]
                self.engine.abort(output.request_id)

    @staticmethod
    def _tell(deliver: Deliver, output: Output | Exception) -> bool:
        """Whether it was taken. Whoever takes it may be gone, and is not to end others."""
        try:
            deliver(output)
        except BaseException:
            log.exception("an output could not be delivered")
            return False
        return True

    # --- forks of the process ---

    def _before_fork(self) -> None:
        """Hold the engine between two steps."""
        if self._thread is None or self._closed is not None or threading.current_thread() is self._thread:
            return
        held = threading.Event()
        self._go_on = threading.Event()
        go_on = self._go_on

        def hold(_: Engine) -> None:
            held.set()
            go_on.wait()

        self._commands.put(hold)
        while not held.wait(0.1) and self._thread.is_alive():
            pass

    def _after_fork_in_parent(self) -> None:
        self._go_on.set()

    def _after_fork_in_child(self) -> None:
        """It has none of the parent's threads, and perhaps locks that nobody will open."""
        self._begin()
        self.engine.begin_in_fork()
        for request_id, deliver in self._deliver.items():
            self.engine.abort(request_id)
            self._tell(deliver, EngineClosedError("the process forked, and this request runs in the parent"))
        self._deliver.clear()


_forking: list[EngineLoop] = []  # those that are held back while the process forks


def _before_fork() -> None:
    _forking[:] = _loops
    for loop in _forking:
        loop._before_fork()


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop()._after_fork_in_parent()


def _after_fork_in_child() -> None:
    while _forking:
        _forking.pop()._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
