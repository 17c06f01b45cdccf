"""Where an output stands in a grammar, and which tokens it allows next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol


class Matcher(Protocol):
    """Of llguidance: where one text stands in a grammar. Once in error, it stays so. It raises nothing, unless its Rust
    code panics."""

    def deep_copy(self) -> Matcher: ...

    def consume_tokens(self, token_ids: list[int]) -> bool: ...

    def validate_tokens(self, token_ids: list[int]) -> int: ...

    def rollback(self, num_tokens: int) -> bool: ...

    def compute_bitmask(self) -> bytes: ...

    def is_stopped(self) -> bool: ...

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...


class Mask:
    """Which tokens may be drawn next. It is computed on another thread, while the model computes the row."""

    __slots__ = ("_bits", "_state")

    def __init__(self, bits: Future[bytes], state: GrammarState) -> None:
        self._bits = bits
        self._state = state

    def bits(self) -> bytes:
        """A bit for each token id, the lowest of a byte first; those behind the last byte may not be drawn. All are 0
        where the grammar failed."""
        return self._bits.result()

    @property
    def error(self) -> str | None:
        """Why nothing may be drawn."""
        return self._state.error


class GrammarState:
    """Where a sequence's output stands in a grammar. Attached to the sequence (SequenceState)."""

    __slots__ = ("_mask", "_matcher", "_panic", "num_tokens")

    def __init__(self, matcher: Matcher, num_tokens: int = 0) -> None:
        self._matcher = matcher
        self._mask: Mask | None = None  # of where it stands
        self._panic: str | None = None
        self.num_tokens = num_tokens  # taken in

    def mask(self) -> Mask:
        """Of the next token. Begins to compute it, once for each place."""
        if self._mask is None:
            self._mask = Mask(_beside().submit(self._bits), self)
        return self._mask

    def _bits(self) -> bytes:
        try:
            bits = self._matcher.compute_bitmask()
            # One that met a limit allows the end: an output that is no whole would look as if it were.
            return b"\0" if self._matcher.is_error() else bits
        except BaseException as error:  # or else it is raised where a step looks at the mask, and ends all requests
            self._panic = f"{type(error).__name__}: {_first_line(str(error))}"
            return b"\0"

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but an end."""
        matcher = self._settled()
        return matcher.is_stopped() and not matcher.is_error()

    @property
    def error(self) -> str | None:
        """Of a grammar that met a limit on the way."""
        if self._panic is not None:
            return self._panic
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def fork(self) -> GrammarState:
        copy = GrammarState(self._settled().deep_copy(), self.num_tokens)
        copy._panic = self._panic
        return copy

    def advance(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._settled().consume_tokens(list(token_ids))
            self.num_tokens += len(token_ids)
            self._mask = None

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these may follow, one after the other, from the first on; none where that cannot be told."""
        try:
            return self._settled().validate_tokens(list(token_ids))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of Rust code is no Exception
            return 0

    def rollback(self, num_tokens: int) -> None:
        if num_tokens:
            self._settled().rollback(num_tokens)
            self.num_tokens -= num_tokens
            self._mask = None

    def _settled(self) -> Matcher:
        """Once no other thread has it in its hands."""
        if self._mask is not None:
            self._mask.bits()
        return self._matcher


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


_executors: list[ThreadPoolExecutor] = []  # none before the first is needed, and none of a parent's


def _before_fork() -> None:
    """Finish what was begun: in the child there is no thread to do it, and whoever needs a mask would wait for ever."""
    for executor in tuple(_executors):
        with suppress(RuntimeError):  # the interpreter is going
            executor.submit(int).result()


# After the import of ThreadPoolExecutor, which locks every executor for a fork: hooks run in the reverse order, and
# none of ours may wait for an executor behind that lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_executors.clear)


def _beside() -> ThreadPoolExecutor:
    if not _executors:
        _executors.append(ThreadPoolExecutor(1, "octavo-grammar"))
    return _executors[0]
