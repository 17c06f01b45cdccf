"""A program in a pseudo-terminal of its own: a person's keys, and what the person sees."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"  # what a terminal puts around pasted text when it is asked to
ASKS_FOR_PASTES = re.escape("\x1b[?2004h")


class Terminal:
    """`octavo COMMAND …`, where ^C makes a signal or a key, as the program wants it."""

    def __init__(self, *arguments: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1", "TERM": "xterm"}
        env["PROMPT_TOOLKIT_NO_CPR"] = "1"  # it would ask the terminal where the cursor is, and nobody answers here
        command = [sys.executable, "-m", "octavo", *arguments]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, env)
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Read up to `pattern`; what came before it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {pattern!r} in {self.seen[-2000:]!r}"
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                data = b""
            assert data, f"ended without {pattern!r}: {self.seen[-2000:]!r}"
            self.seen += data.decode("utf-8", "replace")
        before, self.seen = self.seen[: match.start()], self.seen[match.end() :]
        return before

    def expect_prompt(self) -> None:
        """The program waits for a message, and has asked the terminal to mark what is pasted."""
        self.expect(ASKS_FOR_PASTES + r"[^\n>]*>")

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        deadline = time.monotonic() + 60
        while True:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], "it goes on"
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:  # Linux reports the end of a pty so
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)
