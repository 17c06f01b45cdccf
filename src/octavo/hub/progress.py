"""What long downloads report to. On a terminal: bars on stderr. Elsewhere: no bars, notes go to `logging`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)


class Bar(Protocol):
    """One stage of the work."""

    def update(self, completed: int, total: int | None = None) -> None:
        """`completed` bytes so far; `total` bytes replaces the bar's total when it has become known."""
        ...


class Progress(Protocol):
    """Receiver of the progress of a download."""

    @property
    def interactive(self) -> bool:
        """True when bars are drawn on a terminal."""
        ...

    def note(self, text: str) -> None:
        """A line the user should read (a licence, waiting for another process)."""
        ...

    def bar(self, description: str, total: int | None) -> AbstractContextManager[Bar]:
        """A bar for a stage of `total` bytes, None when unknown."""
        ...


class _NoBar:
    def update(self, completed: int, total: int | None = None) -> None:
        pass


class LogProgress:
    """No bars; notes are log records of level WARNING, stages of level INFO."""

    interactive = False

    def note(self, text: str) -> None:
        logger.warning("%s", text)

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Bar]:
        logger.info("%s", description)
        yield _NoBar()


class _RichBar:
    def __init__(self, bars: object, task: object) -> None:
        self._bars, self._task = bars, task

    def update(self, completed: int, total: int | None = None) -> None:
        known = {} if total is None else {"total": total}
        self._bars.update(self._task, completed=completed, **known)  # type: ignore[attr-defined]


class TerminalProgress:
    """Bars with bytes, speed and time left on stderr; each disappears when its stage is done."""

    interactive = True

    def note(self, text: str) -> None:
        sys.stderr.write(text + "\n")

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Bar]:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _RichBar(bars, bars.add_task(description, total=total))


def default_progress() -> Progress:
    """Bars when stderr is a terminal, log records otherwise."""
    return TerminalProgress() if sys.stderr is not None and sys.stderr.isatty() else LogProgress()
