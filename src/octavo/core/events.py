"""Every decision leaves an event with a reason code in a ring buffer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

log = logging.getLogger(__name__)


class EventKind(StrEnum):
    QUEUED = "queued"
    WAITING = "waiting"
    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    EVICTED = "evicted"
    RESTORED = "restored"
    FINISHED = "finished"
    FAILED = "failed"
    STEP_RETRIED = "step_retried"
    CACHE_HIT = "cache_hit"  # tokens taken from the prefix cache
    CACHE_EVICTED = "cache_evicted"  # a block left the prefix cache


class Reason(StrEnum):
    NONE = ""
    MAX_NUM_SEQS = "max_num_seqs"  # no free place among the running sequences
    TOKEN_BUDGET = "token_budget"  # the step's tokens are used up
    NO_BLOCKS = "no_blocks"  # the pool has too few free blocks
    HIGHER_PRIORITY = "higher_priority"  # blocks went to an older or more important request
    IDLE = "idle"  # a sequence that nobody asks anything of
    SHARED_PREFIX = "shared_prefix"  # another sequence computes the block that is needed next
    LOADING = "loading"  # the block that is needed next is being read from kv_offload_dir
    CAPACITY = "capacity"  # its memory was needed
    RESET = "reset"  # somebody asked for it
    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    ABORT = "abort"
    ERROR = "error"
    STEP_RAISED = "step_raised"


class Event(NamedTuple):
    time: float  # seconds, the engine's clock
    step: int
    kind: EventKind
    request_id: str
    reason: Reason
    detail: str


Listener = Callable[[Event], None]


class EventRing:
    """The last `capacity` events, oldest first; listeners are called as events happen. One that raises is called no
    more."""

    def __init__(self, clock: Callable[[], float], capacity: int = 4096) -> None:
        self.step = 0
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=capacity)
        self._listeners: list[Listener] = []

    def emit(self, kind: EventKind, request_id: str = "", reason: Reason = Reason.NONE, detail: str = "") -> None:
        event = Event(self._clock(), self.step, kind, request_id, reason, detail)
        self._events.append(event)
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener of events raised, and is called no more")
                self._listeners.remove(listener)

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(tuple(self._events))

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self._events if event.kind is kind]
