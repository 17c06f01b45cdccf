"""A batch's output: one line an answer, in OpenAI's form, in the order in which they come.

``{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}},
"error": null}``

What is whole in the file stays true whenever the program is ended: a line is written at once, behind the others, and
one that was cut off is cut away when the batch goes on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from octavo.core.errors import InvalidRequestError, shown
from octavo.server.batch.ledger import Ledger

_FIELD = "--output-file"
_BEGINNING = b'{"id":"batch_req_'  # of each line that we write
_ELSE = "choose another, or --overwrite it"


class BatchResponse(msgspec.Struct, forbid_unknown_fields=True):
    """What the server answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, forbid_unknown_fields=True):
    """Why it was not asked."""

    code: str
    message: str


class BatchAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """One line; either `response` or `error` is None."""

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchError | None

    @property
    def succeeded(self) -> bool:
        return self.response is not None and self.response.status_code == 200


def as_line(answer: BatchAnswer) -> bytes:
    return _encode(answer) + b"\n"


class _Fingerprint(msgspec.Struct):
    system_fingerprint: str | None = None


_decode = msgspec.json.Decoder(BatchAnswer).decode
_encode = msgspec.json.Encoder().encode
_fingerprint_of = msgspec.json.Decoder(_Fingerprint).decode


class Output:
    """Where answers go: a pipe or a device, of which nothing is known.

    Use: `find`, which changes nothing; `check_fingerprint`; `begin`; then `put`. Each raises InvalidRequestError naming
    the output.
    """

    num_answered = 0  # before this batch

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file

    def find(self, ledger: Ledger) -> None:
        """Tell what was answered before: all that has succeeded. The rest is asked again."""

    def check_fingerprint(self, ours: str) -> None:
        """All answers of an output are one model's."""

    def begin(self) -> None:
        """Cut away what is asked again, and a last line that is not whole."""

    def put(self, answer: BatchAnswer) -> None:
        with self._errors():
            self._file.write(as_line(answer))
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # told when it was written
            self._file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(f"cannot be written: {error.strerror or error}") from None

    def _error(self, problem: str) -> InvalidRequestError:
        return InvalidRequestError(_FIELD, f"{self._name} {problem}")


class OutputFile(Output):
    """A file that a batch may go on with. Nobody else writes to it meanwhile.

    Args:
        path: of the file itself, which may have another name.
        created: it has come to be for this batch, and goes again if that does not begin.
        overwrite: whatever it holds.
    """

    def __init__(self, name: str, path: Path, file: BinaryIO, *, created: bool, overwrite: bool) -> None:
        super().__init__(name, file)
        self._path = path
        self._created = created
        self._overwrite = overwrite
        self._end = 0  # behind the last line that is whole
        self._drops = False  # something before it is asked again
        self._system_fingerprint: str | None = None  # of an answer that has one
        if not _locked(file):
            raise self._error("is being written by another program")

    def find(self, ledger: Ledger) -> None:
        if self._overwrite:
            return
        with self._errors():
            if not _is_beginning(self._file.read(len(_BEGINNING))):  # before it is taken for a line, however long
                raise self._not_ours(1)
            self._file.seek(0)
            for number, line in enumerate(self._file, 1):
                if not _is_beginning(line[: len(_BEGINNING)]):
                    raise self._not_ours(number)
                if not line.endswith(b"\n"):
                    return  # the program was ended while it wrote this
                self._take(ledger, line, number)
                self._end += len(line)

    def _take(self, ledger: Ledger, line: bytes, number: int) -> None:
        try:
            answer = _decode(line)
        except msgspec.DecodeError:
            raise self._not_ours(number) from None
        if not answer.succeeded or answer.custom_id is None or answer.response is None:
            self._drops = True
            return
        if not ledger.note_answered(answer.custom_id, answer.id):
            raise self._error(f"answers {shown(answer.custom_id)} a second time in line {number}; {_ELSE}")
        self.num_answered += 1
        if self._system_fingerprint is None:
            self._system_fingerprint = _fingerprint_of(answer.response.body).system_fingerprint

    def check_fingerprint(self, ours: str) -> None:
        if self._system_fingerprint not in (None, ours):
            told = f"by the system_fingerprint {self._system_fingerprint}, which is here {ours}"
            raise self._error(f"has answers of another model or version, {told}; {_ELSE}")

    def begin(self) -> None:
        self._created = False
        with self._errors():
            if self._drops:
                self._rewrite()
            else:
                self._file.truncate(self._end)
            self._file.seek(0, os.SEEK_END)

    def _rewrite(self) -> None:
        """In a new file that takes this one's place, so that at no moment an answer is missing."""
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f"{self._path.name}.")
        new = os.fdopen(descriptor, "r+b")
        try:
            _locked(new)
            shutil.copymode(self._path, name)
            self._file.seek(0)
            while self._file.tell() < self._end:
                line = self._file.readline()
                if _decode(line).succeeded:
                    new.write(line)
            new.flush()
            os.fsync(descriptor)
            Path(name).replace(self._path)
        except BaseException:
            new.close()
            Path(name).unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new

    def close(self) -> None:
        if self._created:
            self._path.unlink(missing_ok=True)
        super().close()

    def _not_ours(self, number: int) -> InvalidRequestError:
        return self._error(f"was not written by octavo run-batch: see line {number}; {_ELSE}")


def _is_beginning(head: bytes) -> bool:
    """Of a line of ours, which may be cut off."""
    return _BEGINNING.startswith(head)


def _locked(file: BinaryIO) -> bool:
    """For as long as it is open, in whatever way the program ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        pass
    return True


def open_output(name: str, *, overwrite: bool = False) -> Output:
    """A file, or whatever else is there. What it holds stays as it is until `begin`. Raises InvalidRequestError naming
    the output."""
    try:
        path = Path(name)
        if path.exists() and not path.is_file():
            return Output(name, path.open("wb"))
        path = path.resolve()  # a link stays one
        created = not path.exists()
        file = path.open("x+b" if created else "r+b")
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(_FIELD, f"{shown(name)} cannot be written: {reason}") from None
    try:
        return OutputFile(name, path, file, created=created, overwrite=overwrite)
    except BaseException:
        file.close()
        raise
