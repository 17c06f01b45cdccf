"""Blocks on their way from the tier into the radix tree.

A block that is asked for is read by the tier, on another thread. When it has come, a step puts it into a block of the
pool; when that step has returned it goes into the tree, idle, and whoever asked for it finds it there like anything
else that is cached. So requests with one prefix load it once, and no table names a block whose KV is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from octavo.core.namespace import Namespace
from octavo.kv_cache.radix_tree import Key, Node

MOST_LOADS = 64  # at once: their KV is held outside of the pool
GIVE_UP_SECONDS = 10.0  # after which a disk does not answer: whoever waits computes


@dataclass(slots=True, eq=False)
class Load:
    digest: bytes  # names its prefix in the tier
    parent: Node | Load | None  # what holds the block before it; None: it is the first of its namespace
    namespace: Namespace
    key: Key  # its tokens
    request_id: str  # who asked first
    future: Future[bytes | None]
    since: float  # seconds
    block: int | None = None  # of the pool, once it has one
    node: Node | None = None  # once it is in the tree
    failed: bool = False

    @property
    def is_early(self) -> bool:
        """Whether the block before it is still on its way."""
        parent = self.parent
        return isinstance(parent, Load) and not parent.failed and parent.node is None and parent.block is None

    @property
    def is_lost(self) -> bool:
        """Whether the block before it is not there any more, or never came."""
        parent = self.parent_node
        if parent is not None:
            return parent.parent is None
        return isinstance(self.parent, Load) and self.parent.failed

    @property
    def parent_node(self) -> Node | None:
        return self.parent.node if isinstance(self.parent, Load) else self.parent


class TierLoads:
    """Those under way, by digest; a block comes after the one before it. Blocks and nodes are the manager's."""

    def __init__(self) -> None:
        self._loads: dict[bytes, Load] = {}
        self._unusable: set[bytes] = set()  # did not come, or could not be written: not tried again
        self.placed: list[Load] = []  # in the step being made or under way

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, digest: bytes | None) -> bool:
        return digest in self._loads

    def get(self, digest: bytes) -> Load | None:
        return self._loads.get(digest)

    def may_begin(self, digest: bytes) -> bool:
        return len(self._loads) < MOST_LOADS and digest not in self._unusable

    def begin(self, load: Load) -> None:
        self._loads[load.digest] = load

    def ready(self, now: float) -> Iterator[tuple[Load, bytes]]:
        """Those that have come and can be placed now. Those that never will be end here."""
        for load in tuple(self._loads.values()):
            if load.is_early:
                continue
            kv = None if load.is_lost else _outcome(load.future)
            if kv is not None:
                yield load, kv
            elif load.is_lost:
                self.end(load, failed=True)
            elif load.future.done() or now - load.since > GIVE_UP_SECONDS:
                self.end(load, failed=True, unusable=True)

    def place(self, load: Load, block: int) -> None:
        load.block = block
        self.placed.append(load)

    def end(self, load: Load, failed: bool, unusable: bool = False) -> None:
        load.failed = failed
        self._loads.pop(load.digest, None)
        if unusable:
            if len(self._unusable) >= 4096:
                self._unusable.clear()
            self._unusable.add(load.digest)

    def renew(self, digest: bytes) -> None:
        """The block is given to the tier anew."""
        self._unusable.discard(digest)

    def wait(self, seconds: float) -> None:
        """Until one more has come, at most so long."""
        pending = [load.future for load in self._loads.values() if not load.future.done()]
        if pending:
            wait(pending, seconds, FIRST_COMPLETED)

    def forget(self) -> None:
        """Nobody waits for them any more."""
        for load in self._loads.values():
            load.failed = True
        self._loads.clear()


def _outcome(future: Future[bytes | None]) -> bytes | None:
    """None: it has not come, or reading failed."""
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result()
