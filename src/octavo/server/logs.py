"""The log, in one form for both of the server's processes: a line for people, or an object of JSON, for each record.

A record can hold fields, ``log.info(..., extra=with_fields(status=200))``. What clients send may be anywhere in it:
what could end a line, or drive a terminal, is escaped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from octavo.config import LOG_LEVELS
from octavo.core.errors import ConfigError, shown

log = logging.getLogger(__name__)
_FIELDS = "octavo_fields"
_WAITING = 10_000  # lines that wait for a slow reader; beyond, they are dropped
_POLL = 0.05  # seconds
_END_SECONDS = 2.0  # for those to be written at the end
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:,{}")

encode = msgspec.json.Encoder().encode


def with_fields(**fields: Any) -> dict[str, Any]:
    """`extra` of a record. Fields that are None are left out."""
    return {_FIELDS: {name: value for name, value in fields.items() if value is not None}}


class Target(Protocol):
    """Where lines go: a file without a buffer."""

    def write(self, data: bytes, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class LogFormat:
    """Of one process. Raises ConfigError."""

    format: str = "text"  # or "json"
    level: str = "warning"
    process: str = "octavo"  # who says it

    def __post_init__(self) -> None:
        if self.format not in ("text", "json") or self.level not in LOG_LEVELS:
            raise ConfigError(f"log_format: no such form: {shown(self)}")

    def formatter(self) -> logging.Formatter:
        return JSONFormatter(self.process) if self.format == "json" else TextFormatter(self.process)


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.000 INFO octavo: message key=value``; a traceback follows in lines that are indented."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        parts = [f"{when}.{int(record.msecs):03} {record.levelname} {self._process}: {escaped(record.getMessage())}"]
        parts += [f"{name}={_word(value)}" for name, value in getattr(record, _FIELDS, {}).items()]
        traceback = "".join(f"\n    {escaped(line)}" for line in _traceback(self, record).splitlines())
        return " ".join(parts) + traceback


class JSONFormatter(logging.Formatter):
    """One object a record: time, level, process, logger, message, fields, traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": escaped(record.getMessage(), "\n\t"),
        }
        told |= {name: _plain(value) for name, value in getattr(record, _FIELDS, {}).items() if name not in told}
        if traceback := _traceback(self, record):
            told["traceback"] = escaped(traceback, "\n\t")
        return encode(told).decode()


def line_of(form: LogFormat, message: str, **fields: Any) -> str:
    """What is told outside the log, in its form."""
    record = logging.makeLogRecord({"name": "octavo", "levelno": logging.INFO, "levelname": "INFO", "msg": message})
    record.__dict__.update(with_fields(**fields))
    return form.formatter().format(record)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def escaped(text: str, but: str = "\t") -> str:
    """Without control characters and what else is not to be seen, each as Python writes it in a string."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in but else repr(one)[1:-1] for one in text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {escaped(str(name)): _plain(one) for name, one in value.items()}
    return escaped(str(value), "\n\t")


def _word(value: Any) -> str:
    """A value that ends where the next field begins."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    text = value if isinstance(value, str) else str(_plain(value))
    if text and _PLAIN.issuperset(text):
        return text
    return escaped(encode(text.encode(errors="backslashreplace").decode()).decode())


class QueuedHandler(logging.Handler):
    """Writes on a thread of its own: whoever reads the log slowly, or not at all, holds up no request. What is written
    is a whole line at a time, since another process may write there as well."""

    def __init__(self, target: Target, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._target = target
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write_all, name="octavo-log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(self._line(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace") + b"\n"

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._write(line)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                told = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                told["msg"] = f"{dropped} lines were dropped, since the log is read too slowly"
                self._write(self._line(logging.makeLogRecord(told)))

    def _write(self, line: bytes) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            while line:
                count = self._target.write(line)
                if count is None:  # it does not wait by itself
                    time.sleep(_POLL)
                line = line[count or 0 :]

    def close(self) -> None:
        """What waits is written before, if it is read in time."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_END_SECONDS)
            self._writer.join(_END_SECONDS)
        super().close()


@contextmanager
def logging_to_stderr(form: LogFormat) -> Iterator[None]:
    """`logging_to` the descriptor itself: a thread that writes into a Python file as the process ends would hold its
    lock."""
    try:
        target = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115 - it stays open
    except OSError:  # there is none
        yield
        return
    with logging_to(target, form):
        yield


@contextmanager
def logging_to(target: Target, form: LogFormat) -> Iterator[None]:
    """While the block runs, the log of this process goes there: Octavo's at the level that was asked for, that of
    libraries from warnings on, and what threads die of."""
    root, ours = logging.getLogger(), logging.getLogger("octavo")
    handlers, level, root_level, excepthook = ours.handlers[:], ours.level, root.level, threading.excepthook
    handler = QueuedHandler(target, form.formatter())
    ours.handlers[:] = []
    ours.setLevel(form.level.upper())
    root.setLevel(logging.WARNING)
    root.addHandler(handler)
    logging.captureWarnings(True)
    threading.excepthook = _tell_thread
    try:
        yield
    finally:
        threading.excepthook = excepthook
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(root_level)
        ours.setLevel(level)
        ours.handlers[:] = handlers
        handler.close()


def _tell_thread(died: Any) -> None:
    """For `threading.excepthook`."""
    if died.exc_type is SystemExit:
        return
    name = "?" if died.thread is None else died.thread.name
    value = died.exc_type() if died.exc_value is None else died.exc_value
    log.error("the thread %s died", name, exc_info=(died.exc_type, value, died.exc_traceback))
