"""Arrays of strings in GGUF metadata, located at once and decoded on access."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from octavo._C import decode_pairs, decode_strings, strings_within
from octavo._C import locate_strings as _locate
from octavo.core.errors import ModelFormatError

_ENCODING = "utf-8"
# Bytes that are not UTF-8 become lone surrogates: unlike with "replace", different strings stay different, and
# `text.encode("utf-8", "surrogateescape")` gives the file's bytes back.
_ERRORS = "surrogateescape"


class StringArray(Sequence[str]):
    """Strings that lie one after another in a mapped file.

    Bytes that are not valid UTF-8 are decoded with "surrogateescape"; `raw` gives the bytes as they are. It keeps the
    file's mapping alive. Use `to_list` to decode many: it is several times faster than indexing.
    """

    __slots__ = ("_buffer", "_ends", "_starts")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, buffer: memoryview, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._buffer = buffer  # the whole file
        self._starts = starts  # [n] offset of each string's first byte
        self._ends = ends  # [n] offset past its last byte

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> StringArray: ...
    def __getitem__(self, index: int | slice) -> str | StringArray:
        if isinstance(index, slice):
            return StringArray(self._buffer, self._starts[index], self._ends[index])
        return self.raw(index).decode(_ENCODING, _ERRORS)

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_list())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self.to_bytes_list() == other.to_bytes_list()
        if isinstance(other, list | tuple):
            return len(self) == len(other) and self.to_list() == list(other)
        return NotImplemented

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"

    def raw(self, index: int) -> bytes:
        """The bytes of one string. Raises IndexError."""
        return bytes(self._buffer[int(self._starts[index]) : int(self._ends[index])])

    def to_list(self) -> list[str]:
        """All strings, decoded."""
        file = np.frombuffer(self._buffer, np.uint8)
        return decode_strings(file, np.ascontiguousarray(self._starts), np.ascontiguousarray(self._ends))

    def to_pairs(self) -> list[tuple[str, str]] | None:
        """All strings, each as the two around its only space; None if one is not of that form or not UTF-8."""
        file = np.frombuffer(self._buffer, np.uint8)
        return decode_pairs(file, np.ascontiguousarray(self._starts), np.ascontiguousarray(self._ends))

    def within(self, text: bytes, *, pairs: bool = False) -> list[int]:
        """Indices of those that occur in a text, none of them empty. With `pairs` they are two parts with a space
        between, and must occur put together."""
        file = np.frombuffer(self._buffer, np.uint8)
        return strings_within(file, np.ascontiguousarray(self._starts), np.ascontiguousarray(self._ends), text, pairs)

    def copied(self) -> StringArray:
        """The same strings, of which the file is needed no more."""
        if not len(self._starts):
            return self
        first = int(self._starts.min())
        blob = bytes(self._buffer[first : int(self._ends.max())])
        return StringArray(memoryview(blob), self._starts - first, self._ends - first)

    def to_bytes_list(self) -> list[bytes]:
        """The bytes of all strings."""
        blob, starts, ends = self._region()
        return [blob[s:e] for s, e in zip(starts, ends, strict=True)]

    def _region(self) -> tuple[bytes, list[int], list[int]]:
        """One copy of the bytes that hold all strings, and the strings' places in it (slicing bytes is fast)."""
        if not len(self._starts):
            return b"", [], []
        first = int(self._starts.min())
        blob = bytes(self._buffer[first : int(self._ends.max())])
        return blob, (self._starts - first).tolist(), (self._ends - first).tolist()


def locate_strings(
    path: Path, field: str, buffer: mmap.mmap, start: int, end: int, count: int
) -> tuple[StringArray, int]:
    """Find `count` strings, each a uint64 length and its bytes, from offset `start` on and wholly before `end`.

    Returns them and the offset after the last. Only lengths are read. The caller has checked that `count` lengths fit
    between `start` and `end`. Raises ModelFormatError.
    """
    starts = np.empty(count, np.int64)
    found, position = _locate(np.frombuffer(buffer, np.uint8), start, end, starts)
    if found < count:
        if position + 8 > min(end, len(buffer)):
            raise ModelFormatError(path, field, f"the file ends before string {found} of {count}")
        (length,) = struct.unpack_from("<Q", buffer, position)
        left = max(0, end - position - 8)
        raise ModelFormatError(path, field, f"string {found} has length {length}, and {left} bytes remain")
    past = np.empty_like(starts)
    past[:-1] = starts[1:] - 8
    past[-1:] = position
    return StringArray(memoryview(buffer), starts, past), position
