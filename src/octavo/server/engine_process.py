"""The process that steps: an engine on its thread, and a socket to the process that asks (`server.remote`).

Started with the number of a socket's descriptor. The first message is the configuration and what else the process is to
do, the answer to it what the engine is like, or why there is none. From then on each message is a tuple whose first
part is its kind; see `_Process`.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.core.errors import EngineClosedError, InvalidRequestError, OctavoError, RequestFailedError
from octavo.core.margins import MarginsSpec
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.session_calls import Generate
from octavo.server.connection import Connection, ConnectionEndedError
from octavo.server.logs import LogFormat, logging_to_stderr

if TYPE_CHECKING:
    from octavo.core.engine_client import Deliver
    from octavo.core.plan import StepPlan
    from octavo.core.structured import StructuredOutputsParams
    from octavo.server.timeline import Timeline
    from octavo.wiring import BuiltEngine

log = logging.getLogger(__name__)
BEAT_SECONDS = 0.25  # between two signs of life
_COMPILERS = 4  # threads


class _Process:
    """What the other process may ask: ("add", specs), ("add_session", spec), ("abort", ids), ("ask", number, name,
    arguments), ("forget", request_id, call), ("close",). What is told: ("started", ids) before the first step of each,
    ("output", output), ("failed", request_id, error), ("answer", number, value), whose parts may be ("later", number),
    ("settled", number, value), ("beat", figures)."""

    def __init__(self, built: BuiltEngine, connection: Connection, timeline: Timeline | None = None) -> None:
        self._built = built
        self._timeline = timeline
        self._loop = built.start()
        self._connection = connection
        self._started: set[str] = set()
        self._later = 0
        self._lock = threading.Lock()
        # By request, what was asked of it while a grammar of it is compiled, in order; and the threads that do that.
        self._behind: dict[str, deque[Any]] = {}
        self._compilers = ThreadPoolExecutor(_COMPILERS, "octavo-prepare")
        self._done = threading.Event()
        built.engine.plan_listeners.append(self._tell_started)

    def run(self) -> None:
        """Until the other process goes, or says so."""
        threading.Thread(target=self._beat, name="octavo-beat", daemon=True).start()
        try:
            while True:
                message = self._connection.receive()
                if message[0] == "close":
                    break
                getattr(self, f"_{message[0]}")(*message[1:])
        except ConnectionEndedError as error:
            log.info("the server's process is gone (%s)", error)
        finally:
            self._done.set()
            self._loop.close()
            self._connection.close()

    # --- what is asked ---

    def _add(self, specs: Sequence[Any]) -> None:
        for spec in specs:
            deliver = partial(self._deliver, spec.request_id)
            self._in_turn(spec.request_id, partial(self._loop.add, [spec], deliver), _grammars(spec), deliver)

    def _in_turn(
        self,
        request_id: str,
        action: Callable[[], object],
        grammars: Sequence[StructuredOutputsParams],
        refuse: Deliver,
    ) -> None:
        """Do it once these grammars are compiled: elsewhere than on the engine's thread, or on this one, where others
        would wait for it. What is asked of the same request meanwhile is done after it."""
        compiled = self._built.frontend.tokens.grammars.is_compiled
        with self._lock:
            behind = self._behind.get(request_id)
            if behind is None and not all(map(compiled, grammars)):
                behind = self._behind[request_id] = deque()
                self._compilers.submit(self._work_off, request_id, behind)
            if behind is not None:
                behind.append((action, grammars, refuse))
                return
        action()

    def _work_off(self, request_id: str, behind: deque[Any]) -> None:
        while True:
            with self._lock:
                if not behind:
                    del self._behind[request_id]
                    return
                action, grammars, refuse = behind.popleft()
            try:
                for one in grammars:
                    self._built.frontend.tokens.grammars.check(one)
                action()
            except OctavoError as error:
                refuse(error)
            except Exception as error:  # or else it ends the process, and the next one that is asked the same
                log.exception("request %s could not be prepared", request_id)
                refuse(RequestFailedError(f"{type(error).__name__}: {error}"))

    def _add_session(self, spec: SessionSpec) -> None:
        self._loop.add_session(spec, partial(self._deliver, spec.request_id))

    def _deliver(self, request_id: str, output: Any) -> None:
        if isinstance(output, Exception):
            self._connection.send(("failed", request_id, output))
            self._started.discard(request_id)
        else:
            self._connection.wait_for_room()
            self._connection.send(("output", output), partial(self._untold, request_id))
            if output.finished:
                self._started.discard(request_id)

    def _untold(self, request_id: str, error: Exception) -> None:
        """An output that cannot be sent ends its request."""
        self._connection.send(("failed", request_id, _unsent(error)))
        self._loop.abort([request_id])

    def _abort(self, request_ids: Sequence[str]) -> None:
        for one in request_ids:
            self._in_turn(one, partial(self._loop.abort, [one]), (), _ignore)

    def _forget(self, request_id: str, call: Any) -> None:
        self._in_turn(request_id, partial(self._loop.forget, request_id, call), (), _ignore)

    def _ask(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        if name == "timeline":  # the engine's thread may stand still, which is to be seen
            nothing = RequestFailedError("no timeline is kept")
            kept = nothing if self._timeline is None else self._timeline.snapshot(*arguments)
            self._connection.send(("answer", number, kept))
            return
        if name not in ("call", "take_back", "explain_cache", "reset_prefix_cache", "cache_order"):
            raise ConnectionEndedError(f"no such question: {name}")
        ask = partial(self._ask_now, number, name, arguments)
        if name in ("call", "take_back"):  # of a session
            grammars = [found for call in arguments[1] for found in _grammars(call.verb)] if name == "call" else []
            self._in_turn(arguments[0], ask, grammars, partial(self._refuse, number))
        else:
            ask()

    def _refuse(self, number: int, error: Exception) -> None:
        """As a session refuses a call, or an engine that is closed does."""
        self._connection.send(("answer", number, [error] if isinstance(error, InvalidRequestError) else error))

    def _ask_now(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        try:
            answer: Future[Any] = getattr(self._loop, name)(*arguments)
        except EngineClosedError as error:
            self._connection.send(("answer", number, error))
            return
        answer.add_done_callback(partial(self._answer, number))

    def _answer(self, number: int, answer: Future[Any]) -> None:
        """In the engine's thread."""
        value = _result(answer)
        if isinstance(value, list):
            value = [self._or_later(part) for part in value]
        self._connection.send(
            ("answer", number, value), lambda error: self._connection.send(("answer", number, _unsent(error)))
        )

    def _or_later(self, part: Any) -> Any:
        if not isinstance(part, Future):
            return part
        self._later += 1
        number = self._later

        def settle(future: Future[Any]) -> None:
            self._connection.send(
                ("settled", number, _result(future)),
                lambda error: self._connection.send(("settled", number, _unsent(error))),
            )

        part.add_done_callback(settle)
        return ("later", number)

    # --- what is told by itself ---

    def _tell_started(self, plan: StepPlan) -> None:
        new = [one for one in dict.fromkeys(grant.request_id for grant in plan.grants) if one not in self._started]
        if new:
            self._started.update(new)
            try:  # before the step, which may be the last
                self._connection.send_now(("started", new))
            except OSError:
                log.info("the server's process is gone")

    def _beat(self) -> None:
        engine = self._built.engine
        while not self._done.wait(BEAT_SECONDS):
            self._connection.send(("beat", {**engine.figures(), "busy": engine.has_unfinished_requests}))


def _grammars(spec: Any) -> list[StructuredOutputsParams]:
    """Of a request, or of what is asked of a session."""
    if isinstance(spec, RequestSpec):
        drawn = [spec]
    elif isinstance(spec, MarginsSpec):
        drawn = [one for one in (spec.margin, spec.answer) if one is not None]
    else:
        drawn = [spec.request] if isinstance(spec, Generate) else []
    return [one.params.grammar for one in drawn if one.params.grammar is not None]


def _ignore(error: Exception) -> None:
    """Of what needs no answer."""


def _unsent(error: Exception) -> RequestFailedError:
    return RequestFailedError(f"the answer cannot be sent: {error}")


def _result(future: Future[Any]) -> Any:
    """Its value, or what it raised as a value."""
    if future.cancelled():
        return RequestFailedError("was cancelled")
    error = future.exception()
    if error is None:
        return future.result()
    return error if isinstance(error, Exception) else RequestFailedError(f"{type(error).__name__}: {error}")


def _open(connection: Connection, settings: dict[str, Any], keeps_timeline: bool) -> _Process | None:
    from octavo.build import build_engine

    gc.disable()  # what comes into being here stays
    try:
        built = build_engine(EngineConfig(**settings))
    except OctavoError as error:
        connection.send(("refused", error))
        return None
    except Exception as error:
        log.exception("the engine could not be built")
        connection.send(("refused", RequestFailedError(f"{type(error).__name__}: {error}")))
        return None
    finally:
        gc.freeze()
        gc.enable()
    timeline = None
    if keeps_timeline:
        from octavo.server.timeline import Timeline

        timeline = Timeline(built)
    process = _Process(built, connection, timeline)
    connection.send(
        (
            "ready",
            built.frontend.limits,
            built.system_fingerprint,
            str(built.memory_plan),
            built.model_config.hidden_size,
        )
    )
    return process


def main(arguments: Sequence[str]) -> int:
    """Ctrl-C in a terminal goes to all processes, and SIGTERM of a supervisor may: they are the other one's to answer.
    When that one ends, this one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=int(arguments[0])), "engine-socket")
    try:
        settings, options = connection.receive()
    except ConnectionEndedError:
        return 0
    with logging_to_stderr(LogFormat(options["log_format"], options["log_level"], "octavo engine")):
        process = _open(connection, settings, options["timeline"])
        if process is None:
            connection.close()
            return 2
        process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
