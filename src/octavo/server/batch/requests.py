"""The lines of a batch's input: requests in OpenAI's form, or why a line is none.

``{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}``
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from octavo.core.errors import InvalidRequestError, shown
from octavo.server.batch.ledger import Ledger
from octavo.server.errors import ApiError, instead, printable
from octavo.server.json_body import parse_json
from octavo.server.settings import Limits

# Routes that answer a body by itself: what they are asked needs nothing that was asked before.
URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/octavo/beam_search",
    "/v1/octavo/margins",
    "/v1/octavo/ask",
)
_FIELDS = "custom_id", "method", "url", "body"
_AROUND = 1 << 16  # bytes of a line that are not its body's
_BOM = b"\xef\xbb\xbf"  # which some editors put before a text


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that is to be answered."""

    number: int  # of the line, from 1
    size: int  # bytes of the input up to its end, from the end of the item before
    id: str  # of the answer: the same for the same request, and for no other of a batch
    custom_id: str
    url: str
    body: bytes  # JSON


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request."""

    number: int
    size: int
    id: str
    custom_id: str | None  # None: it has none, or an earlier line's
    code: str
    message: str


class _BadLineError(Exception):
    """`field`: None where the line as a whole is at fault. `custom_id`: where the line has one of its own."""

    def __init__(self, code: str, field: str | None, problem: str, custom_id: str | None = None) -> None:
        super().__init__(f" {problem}" if field is None else f": {field}: {problem}")
        self.code = code
        self.custom_id = custom_id


class BatchInput:
    """What of a batch is to be done, line by line, as it is read.

    Args:
        name: of the input, for errors.
        file: is read as far as is iterated, and may have no end.
        ledger: knows what was answered before, and is told what is asked.
    """

    def __init__(self, name: str, file: BinaryIO, ledger: Ledger, limits: Limits) -> None:
        self._name = name
        self._file = file
        self._ledger = ledger
        # Around the body is an object, and the server looks at the body again.
        self._limits = replace(
            limits,
            max_json_depth=limits.max_json_depth + 1,
            max_json_values=limits.max_json_values + len(_FIELDS),
        )
        self._most = limits.max_body_bytes + _AROUND
        self._reading = False
        self.num_requests = 0  # lines that are not empty
        self.num_answered = 0  # of them, before this batch began

    def close(self) -> None:
        """Unless a thread waits for a line, which would have to end first: then it ends with the program."""
        if not self._reading:
            self._file.close()

    def __iter__(self) -> Iterator[BatchRequest | BadLine]:
        """All but what was answered before. Raises InvalidRequestError where the input cannot be read, and for what was
        another request when it was answered: the answers are those of another input."""
        number = size = 0
        while line := self._read_line():
            number += 1
            size += len(line)
            size += (skipped := self._skip_rest(line))
            if number == 1:
                line = line.removeprefix(_BOM)
            if not skipped and not line.strip():
                continue
            self.num_requests += 1
            try:
                if skipped or len(line) > self._most:
                    raise _BadLineError("invalid_line", None, f"has more than {self._most} bytes")
                custom_id, url, body = self._parts(line)
            except _BadLineError as error:
                problem = printable(f"line {number}{error}")
                yield BadLine(number, size, _id("line", number), error.custom_id, error.code, problem)
                size = 0
                continue
            identity = _id("request", custom_id, url, body)
            before = self._ledger.answer(custom_id)
            if before is None:
                yield BatchRequest(number, size, identity, custom_id, url, body)
                size = 0
            elif before == identity:
                self.num_answered += 1
            else:
                problem = f"line {number}: {shown(custom_id)} was another request when it was answered"
                raise InvalidRequestError("--input-file", f"{problem}; choose another output, or --overwrite this one")

    def _read_line(self) -> bytes:
        """Or the beginning of one that is too long."""
        self._reading = True
        try:
            return self._file.readline(self._most + 1)
        except OSError as error:
            problem = f"{self._name} cannot be read: {error.strerror or error}"
            raise InvalidRequestError("--input-file", problem) from None
        finally:
            self._reading = False

    def _skip_rest(self, line: bytes) -> int:
        """Bytes that were left of it. It is too long to be kept."""
        skipped = 0
        while len(line) > self._most and not line.endswith(b"\n"):
            line = self._read_line()
            skipped += len(line)
        return skipped

    def _parts(self, line: bytes) -> tuple[str, str, bytes]:
        """custom_id, url and body. Raises _BadLineError."""
        try:
            given = parse_json(line, self._limits)
        except ApiError as error:
            raise _BadLineError("invalid_json", None, error.message.removeprefix("the body ")) from None
        if not isinstance(given, dict):
            problem = f"must be an object with {', '.join(_FIELDS)}, not {shown(given)}"
            raise _BadLineError("invalid_line", None, problem)
        custom_id = self._custom_id(given)
        if problem_of := self._problem(given):
            raise _BadLineError(*problem_of, custom_id)
        return custom_id, given["url"], json.dumps(given["body"], ensure_ascii=False, separators=(",", ":")).encode()

    def _custom_id(self, given: dict[str, Any]) -> str:
        """Of an object that may be no request: its answer names it all the same. Raises _BadLineError."""
        custom_id = given.get("custom_id")
        if custom_id is None:
            raise _BadLineError("invalid_custom_id", "custom_id", "is missing")
        if not isinstance(custom_id, str) or not custom_id:
            raise _BadLineError(
                "invalid_custom_id", "custom_id", f"must be a string, not empty, not {shown(custom_id)}"
            )
        if not self._ledger.note_asked(custom_id):
            raise _BadLineError("duplicate_custom_id", "custom_id", f"{shown(custom_id)} is that of an earlier line")
        return custom_id

    def _problem(self, given: dict[str, Any]) -> tuple[str, str, str] | None:
        """Code, field and what is wrong."""
        for name in given:
            if name not in _FIELDS:
                return "unknown_field", shown(name), f"is not known here; {instead(name, _FIELDS)}"
        for name in _FIELDS:
            if given.get(name) is None:
                return f"invalid_{name}", name, "is missing"
        url, body = given["url"], given["body"]
        if given["method"] != "POST":
            return "invalid_method", "method", f"must be POST, not {shown(given['method'])}"
        if not isinstance(url, str) or url not in URLS:
            return "invalid_url", "url", f"must be one of {', '.join(URLS)}, not {shown(url)}"
        if isinstance(body, dict) and body.get("stream"):
            return "invalid_body", "body.stream", "must not be true: an answer in a batch is one line"
        if isinstance(body, dict) and body.get("request_id") is not None:  # of two that are equal one would fail
            return "invalid_body", "body.request_id", "is not for batches, whose requests are named by custom_id"
        return None


def _id(*parts: object) -> str:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
    return f"batch_req_{digest.hexdigest()}"
