"""Processes that chat templates run in.

What a template does cannot be foreseen, and much of what Python does for one cannot be interrupted in its thread: so it
is done in another process, which the system ends when its time is up or that runs out of its own memory. The thread
that waits for it holds nothing that others need.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import RequestFailedError

if TYPE_CHECKING:
    import subprocess

MAX_PROCESSES = 4  # at work at once for templates of models; who comes later waits his turn
MAX_GUESTS = 2  # the same for templates that come with requests
MAX_WAITING = 60.0  # seconds that a request waits for its turns, all together
_WORKER = Path(__file__).with_name("template_worker.py")
_PASSED_ON = ("LD_LIBRARY_PATH", "TZ")  # of the environment; nothing else there is a template's business
# Processor time is what is limited. Beyond that a process is not waited for: somebody may have stopped it.
_PATIENCE = 120.0  # seconds


class LimitExceededError(Exception):
    """A template used more time or memory than it may."""


class Allowance:
    """What one request may use, whatever number of times it asks: `seconds` of processor time, of which some may be
    `used` before, and `waiting` seconds for its turns."""

    def __init__(self, seconds: float, used: float = 0.0, waiting: float = MAX_WAITING) -> None:
        self.seconds = seconds
        self.left = seconds - used
        self.waiting = waiting

    def used_up(self) -> LimitExceededError:
        self.left = 0.0
        return LimitExceededError(f"it took more than {self.seconds:g} s")


class TemplateProcesses:
    """Starts processes when they are needed and keeps them for the next template. Safe to share by threads."""

    def __init__(self, most: int, kept: int) -> None:
        """`most`: at work at once. `kept`: when idle."""
        self._most = most
        self._kept = kept
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(self._most)
        self._idle: list[_Process] = []

    def _forget(self) -> None:
        """After a fork of this process, in the child: what is idle is the parent's."""
        for process in self._idle:
            process.let_go()
        self._begin()

    def prepare(self) -> None:
        """Start a process now if there is none, for whoever needs it soon. Raises RequestFailedError."""
        with self._lock:
            if not self._idle:
                self._idle.append(_Process())

    def ask(self, request: dict[str, Any], allowance: Allowance) -> dict[str, Any]:
        """The reply of a process. The processor time that it took is taken off the allowance.

        Raises LimitExceededError when this is used up, or the process ends in another way, as it may where memory
        runs out; RequestFailedError if none can be started, or all are at work for longer than the request may wait.
        """
        if allowance.left <= 0:
            raise allowance.used_up()
        with self._turn(allowance):
            # Not before: many may wait, each for a long conversation.
            text = json.dumps({**request, "seconds": allowance.left}, ensure_ascii=False)
            data = text.encode("utf-8", "surrogatepass")
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            if kept is not None:
                with suppress(_EndedEarlyError):  # somebody ended it while it was idle
                    return self._ask(kept, data, allowance)
            return self._ask(_Process(), data, allowance)

    @contextmanager
    def _turn(self, allowance: Allowance) -> Iterator[None]:
        begin = time.monotonic()
        if not self._turns.acquire(timeout=max(0.0, allowance.waiting)):
            raise RequestFailedError("too many chat templates are at work: the wait for a turn was too long")
        try:
            allowance.waiting -= time.monotonic() - begin
            yield
        finally:
            self._turns.release()

    def _ask(self, process: _Process, data: bytes, allowance: Allowance) -> dict[str, Any]:
        """Raises _EndedEarlyError, a RequestFailedError, for a process that ended before it read anything."""
        try:
            reply = process.ask(data, allowance)
        except BaseException:
            process.end()
            raise
        allowance.left -= reply.pop("used")
        with self._lock:
            keep = not reply.pop("last") and len(self._idle) < self._kept
            if keep:
                self._idle.append(process)
        if not keep:
            process.end()
        return reply

    def close(self) -> None:
        """End what is idle. What is at work ends with its work or its time."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()


class _EndedEarlyError(RequestFailedError):
    pass


class _Process:
    """One process; one question at a time."""

    def __init__(self) -> None:
        import subprocess

        if not sys.executable:
            raise RequestFailedError(
                "chat templates need a Python interpreter to run in, and sys.executable names none"
            )
        paths = [str(Path(path).resolve()) for path in sys.path if path]
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), *paths],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is not meant for it
            )
        except OSError as error:
            raise RequestFailedError(f"the process that renders chat templates could not be started: {error}") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)

    def ask(self, data: bytes, allowance: Allowance) -> dict[str, Any]:
        deadline = time.monotonic() + allowance.left + _PATIENCE
        try:
            self._write(len(data).to_bytes(8, "little") + data, deadline)
        except BrokenPipeError:
            raise self._ended(allowance, early=True) from None
        header = self._read(8, deadline)
        text = self._read(int.from_bytes(header, "little"), deadline) if len(header) == 8 else b""
        if not text:
            raise self._ended(allowance, early=False)
        return json.loads(text.decode("utf-8", "surrogatepass"))

    def _ended(self, allowance: Allowance, early: bool) -> Exception:
        """Why it ended without a reply."""
        self.end(kill=False)
        status = self._process.returncode
        if status == -signal.SIGPROF:
            return allowance.used_up()
        if status > 0 or early:
            return _EndedEarlyError(f"the process that renders chat templates does not run: it ended with {status}")
        return LimitExceededError(f"its process ended with signal {-status}")

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            self._wait(self._input.fileno(), "write", deadline)
            left = left[self._input.write(left) or 0 :]

    def _read(self, size: int, deadline: float) -> bytes:
        """Fewer bytes where it ended."""
        pieces: list[bytes] = []
        while size:
            self._wait(self._output.fileno(), "read", deadline)
            piece = self._output.read(min(size, 1 << 20))
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _wait(self, descriptor: int, what: str, deadline: float) -> None:
        """Until it can be read or written, or the other end is closed. Raises LimitExceededError after the deadline."""
        import select

        poll = select.poll()
        poll.register(descriptor, select.POLLIN if what == "read" else select.POLLOUT)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise LimitExceededError("its process does not answer")

    def end(self, kill: bool = True) -> None:
        """Idempotent. Without `kill`: it is ending by itself."""
        if kill:
            self._process.kill()
        self._input.close()
        self._process.wait()
        self._output.close()

    def let_go(self) -> None:
        """Of a process that is not this one's child."""
        self._input.close()
        self._output.close()
        self._process.returncode = 0  # nothing to wait for


processes = TemplateProcesses(MAX_PROCESSES, kept=2)  # for templates of models
# Whoever sends templates with his requests has only these to keep busy, and shares none with the chats of others.
guests = TemplateProcesses(MAX_GUESTS, kept=1)
