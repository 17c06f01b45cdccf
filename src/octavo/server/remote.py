"""An engine in a process of its own, kept alive: an `EngineClient` (octavo.core.engine_client) over a socket.

If the process dies, or stands still with work to do, it is ended and started again. Requests that had begun then end
with an error, since one of them may be what broke it; those that had not are asked again, each of them once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from octavo.core import engine_client
from octavo.core.errors import EngineClosedError, InvalidRequestError, OctavoError, RequestFailedError
from octavo.core.request import SessionSpec
from octavo.server.connection import Connection, ConnectionEndedError

if TYPE_CHECKING:
    from octavo.core.engine_client import Deliver
    from octavo.core.margins import MarginsSpec
    from octavo.core.outputs import CacheExplanation
    from octavo.core.pooling import PoolingSpec
    from octavo.core.request import RequestSpec
    from octavo.frontend import Limits

log = logging.getLogger(__name__)
HANG_SECONDS = 60.0  # without a step, or a sign of life, while there is work
_START_SECONDS = 600.0  # that a model may take to load
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0  # seconds before a new start, doubled each time
_STABLE_SECONDS = 60.0  # after which the next failure counts as the first
_END_SECONDS = 10.0  # for the blocks that are kept to be written


@dataclass(slots=True)
class _Asked:
    """A request under way."""

    spec: Any
    deliver: Deliver
    started: bool = False
    aborted: bool = False
    tries: int = 1


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine's process does beside its engine."""

    log_format: str = "text"  # see octavo.server.logs
    log_level: str = "warning"
    timeline: bool = False  # keep one


@dataclass(frozen=True, slots=True)
class Ready:
    """What an engine is like."""

    limits: Limits
    system_fingerprint: str
    memory_plan: str
    hidden_size: int


class RemoteEngine:
    """See the module. Methods may be called from any thread.

    Args:
        settings: fields of EngineConfig.
        options: what else the process is to do.
        hang_seconds: without a step, while there is work, after which the engine is taken to hang.

    Raises what building an engine raises.
    """

    def __init__(
        self, settings: dict[str, Any], hang_seconds: float = HANG_SECONDS, options: EngineOptions | None = None
    ) -> None:
        self._settings = settings
        self._options = EngineOptions() if options is None else options
        self._hang_seconds = hang_seconds
        self._lock = threading.RLock()
        self._requests: dict[str, _Asked] = {}
        self._answers: dict[int, Future[Any]] = {}
        self._later: dict[int, Future[Any]] = {}
        self._numbers = count()
        self._closed: str | None = None
        self._state = "starting"
        self.num_restarts = 0
        self.figures: dict[str, Any] = {}  # of the last sign of life
        self._beat = (0.0, -1)  # when a step was last seen, and its number
        self._life = 0.0  # when a sign of life came last
        self._process, self._connection, self.ready = self._start()
        self._state = "running"
        self._watcher = threading.Thread(target=self._watch, name="octavo-supervisor", daemon=True)
        self._watcher.start()

    @property
    def state(self) -> str:
        """ "running", "restarting" or "closed"."""
        return self._state

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    # --- the process ---

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection, Ready]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "octavo.server.engine_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C is this process's to answer
                )
            except BaseException:
                ours.close()
                raise
        connection = Connection(ours, "server-socket")
        try:
            with suppress(OSError):  # that it has ended is told where an answer is waited for
                connection.send_now((self._settings, asdict(self._options)))
            ours.settimeout(_START_SECONDS)
            answer = connection.receive()
            ours.settimeout(None)
        except BaseException as error:
            _kill(process)
            process.wait()
            connection.close()
            if isinstance(error, ConnectionEndedError):
                raise EngineClosedError(f"the engine's process ended while it started ({error})") from None
            raise
        if answer[0] == "refused":
            connection.close()
            process.wait()
            raise answer[1]
        self._life = time.monotonic()
        self._beat = (self._life, -1)
        return process, connection, Ready(*answer[1:])

    def _watch(self) -> None:
        """Take what comes, and start anew what ends."""
        failures = 0
        while True:
            began = time.monotonic()
            reader = threading.Thread(target=self._read, args=(self._connection,), name="octavo-replies", daemon=True)
            reader.start()
            interval, looked = min(1.0, self._hang_seconds / 4), began
            while reader.is_alive():
                reader.join(interval)
                now = time.monotonic()
                if now - looked > 2 * interval:  # it is this process that stood still: what came is not read yet
                    self._life, self._beat = now, (now, self._beat[1])
                looked = now
                if reader.is_alive() and self._hangs():
                    log.error("the engine's process %d stands still: it is ended", self._process.pid)
                    _kill(self._process)
            if self._closed is not None:
                return
            _kill(self._process)
            code = self._process.wait()
            log.error("the engine's process ended (%s); it is started again", _told(code))
            self._connection.close()
            self._state = "restarting"
            self._end_started(f"the engine's process ended ({_told(code)}) while the request was under way")
            failures = 0 if time.monotonic() - began > _STABLE_SECONDS else failures
            while self._closed is None:
                time.sleep(min(_FIRST_PAUSE * 2**failures, _LONGEST_PAUSE))
                failures += 1
                try:
                    started = self._start()
                except OctavoError as error:
                    log.error("the engine does not start: %s", error)
                    continue
                except Exception:  # the machine has no process, descriptor or thread left: that passes
                    log.exception("the engine cannot be started")
                    continue
                self._begin_again(started)
                break
            if self._closed is not None:
                return

    def _hangs(self) -> bool:
        now = time.monotonic()
        if now - self._life > self._hang_seconds:
            return True  # it is stopped, or one of its threads holds the interpreter
        return bool(self.figures.get("busy")) and now - self._beat[0] > self._hang_seconds

    def _end_started(self, problem: str) -> None:
        with self._lock:
            ended = [
                one
                for one in self._requests.values()
                if one.started or one.aborted or one.tries > 1 or isinstance(one.spec, SessionSpec)
            ]
            for one in ended:
                del self._requests[one.spec.request_id]
            answers = [*self._answers.values(), *self._later.values()]
            self._answers.clear()
            self._later.clear()
        for one in ended:
            _tell(one.deliver, RequestFailedError(problem))
        for answer in answers:
            _settle(answer, EngineClosedError(problem))

    def _begin_again(self, started: tuple[subprocess.Popen[bytes], Connection, Ready]) -> None:
        with self._lock:
            self._process, self._connection, self.ready = started
            self.num_restarts += 1
            self.figures = {}
            if self._closed is None:
                self._state = "running"  # not before: what is asked goes to this connection
            for one in self._requests.values():
                one.tries += 1
            for one in self._requests.values():  # each by itself: together they may be too large a message
                self._send_requests("add", [one.spec])
        if self._closed is not None:  # meanwhile
            self._finish()

    # --- what comes ---

    def _read(self, connection: Connection) -> None:
        with suppress(ConnectionEndedError):
            while True:
                message = connection.receive()
                try:
                    getattr(self, f"_take_{message[0]}")(*message[1:])
                except Exception:
                    log.exception("a message of the engine's could not be taken")

    def _take_output(self, output: Any) -> None:
        asked = self._requests.get(output.request_id)
        if asked is None:
            return
        if output.finished:
            with self._lock:
                self._requests.pop(output.request_id, None)
        if not _tell(asked.deliver, output) and not output.finished:
            self.abort([output.request_id])

    def _take_failed(self, request_id: str, error: Exception) -> None:
        with self._lock:
            asked = self._requests.pop(request_id, None)
        if asked is not None:
            _tell(asked.deliver, error)

    def _take_started(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if (asked := self._requests.get(request_id)) is not None:
                asked.started = True

    def _take_answer(self, number: int, value: Any) -> None:
        with self._lock:
            answer = self._answers.pop(number, None)
            if isinstance(value, list):
                value = [self._promised(part) for part in value]
        if answer is not None:
            _settle(answer, value)

    def _promised(self, part: Any) -> Any:
        """What is there later comes with a number."""
        if isinstance(part, tuple) and len(part) == 2 and part[0] == "later":
            promised: Future[Any] = Future()
            self._later[part[1]] = promised
            return promised
        return part

    def _take_settled(self, number: int, value: Any) -> None:
        with self._lock:
            promised = self._later.pop(number, None)
        if promised is not None:
            _settle(promised, value)

    def _take_beat(self, figures: dict[str, Any]) -> None:
        now = time.monotonic()
        self._life = now
        if figures["steps"] != self._beat[1] or not figures["busy"]:
            self._beat = (now, figures["steps"])
        self.figures = figures

    # --- an EngineClient ---

    def check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(self._closed)

    def add(self, requests: Sequence[RequestSpec | MarginsSpec | PoolingSpec], deliver: Deliver) -> None:
        self._add("add", requests, deliver)

    def add_session(self, session: SessionSpec, ended: Deliver) -> None:
        if self._state != "running":
            raise EngineClosedError("the engine is being started again")
        self._add("add_session", [session], ended)

    def _add(self, kind: str, requests: Sequence[Any], deliver: Deliver) -> None:
        with self._lock:
            self.check_open()
            refused = [one for one in requests if one.request_id in self._requests]
            for one in requests:
                if one not in refused:
                    self._requests[one.request_id] = _Asked(one, deliver)
            taken = [one for one in requests if one not in refused]
            if taken:
                self._send_requests(kind, taken)
        for one in refused:
            _tell(deliver, InvalidRequestError("request_id", f"{one.request_id!r} is in use"))

    def _send_requests(self, kind: str, specs: Sequence[Any]) -> None:
        def refused(error: Exception) -> None:
            for one in specs:
                self._take_failed(one.request_id, _unsent(error))

        self._connection.send((kind, list(specs) if kind == "add" else specs[0]), refused)

    def run(self, requests: Sequence[RequestSpec | MarginsSpec | PoolingSpec]) -> Generator[Any, None, None]:
        return engine_client.run(self, requests)

    def abort(self, request_ids: Iterable[str], owner: Deliver | None = None) -> None:
        with self._lock:
            ended = []
            for request_id in request_ids:
                asked = self._requests.get(request_id)
                if asked is not None and (owner is None or asked.deliver is owner):
                    asked.aborted = True
                    ended.append(request_id)
            if self._state == "restarting":  # it is not to begin
                left = [self._requests.pop(request_id) for request_id in ended]
            else:
                left = []
                if ended:
                    self._connection.send(("abort", ended))
        for one in left:
            _tell(one.deliver, RequestFailedError("was aborted while the engine was started again"))

    def call(self, request_id: str, calls: Sequence[Any]) -> Future[list[Any]]:
        return self._ask("call", request_id, list(calls))

    def take_back(self, request_id: str, calls: Sequence[Any]) -> Future[None]:
        return self._ask("take_back", request_id, list(calls))

    def forget(self, request_id: str, call: Any) -> None:
        if self._closed is None:
            self._connection.send(("forget", request_id, call))

    def explain_cache(self, token_ids: Sequence[int], salt: str | None) -> Future[CacheExplanation]:
        return self._ask("explain_cache", list(token_ids), salt)

    def reset_prefix_cache(self) -> Future[int]:
        return self._ask("reset_prefix_cache")

    def cache_order(self, prefix: Sequence[int], parts: Sequence[Sequence[int]], salt: str | None) -> Future[list[int]]:
        return self._ask("cache_order", list(prefix), [list(part) for part in parts], salt)

    def timeline(self, seconds: float) -> Future[bytes]:
        """See octavo.server.timeline."""
        return self._ask("timeline", seconds)

    def _ask(self, name: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        with self._lock:
            self.check_open()
            if self._state != "running":
                raise EngineClosedError("the engine is being started again")
            number = next(self._numbers)
            self._answers[number] = answer
            self._connection.send(
                ("ask", number, name, list(arguments)), lambda error: self._take_answer(number, _unsent(error))
            )
        return answer

    # --- the end ---

    def close(self) -> None:
        with self._lock:
            if self._closed is not None:
                return
            self._closed = "the engine was closed"
            self._state = "closed"
        self._finish()
        if threading.current_thread() is not self._watcher:
            self._watcher.join(_END_SECONDS)

    def _finish(self) -> None:
        self._connection.send(("close",))
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(self._process)
        self._connection.close()
        with self._lock:
            left = list(self._requests.values())
            self._requests.clear()
            answers = [*self._answers.values(), *self._later.values()]
            self._answers.clear()
            self._later.clear()
        error = EngineClosedError("the engine was closed before the request ended")
        for one in left:
            _tell(one.deliver, error)
        for answer in answers:
            _settle(answer, error)


def _unsent(error: Exception) -> RequestFailedError:
    return RequestFailedError(f"cannot be sent to the engine: {error}")


def _settle(future: Future[Any], value: Any) -> None:
    with suppress(Exception):  # whoever asked has cancelled it
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)


def _tell(deliver: Callable[[Any], None], output: Any) -> bool:
    try:
        deliver(output)
    except BaseException:
        log.exception("an output could not be delivered")
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.kill(process.pid, signal.SIGKILL)


def _told(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
