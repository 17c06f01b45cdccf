"""The scheduler has no phases.

A sequence has pending positions. Each step grants tokens under a budget, and all that is granted runs as one ragged
batch. Chunked prefill, continuous batching, preemption and restoring are all this one rule. Order within a step:

1. running sequences with one pending position, so that whoever is generating goes on in every step;
2. running sequences with more, in the order of their requests;
3. waiting requests, in order, none overtaking another, while places, tokens and blocks last.

When blocks run out, whole requests are preempted, the newest and least important first and never the oldest, so the
oldest always ends and so does everyone after it. What was preempted waits in its old place in the queue.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from octavo.core.coordinator import Coordinator
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, EventRing, Reason
from octavo.core.plan import BlockCopy, Grant, StepPlan
from octavo.core.sequence import Sequence
from octavo.engine.restore import remember_shares, settle_shares
from octavo.kv_cache import KVCacheManager


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int  # most sequences in a step
    max_num_batched_tokens: int  # most tokens in a step
    max_chunk_tokens: int | None = None  # most tokens of one sequence in a step
    policy: str = "fcfs"  # or "priority"

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence may decode in every step"
            )


@dataclass(slots=True, eq=False)
class _Entry:
    """A request in the queues. Ordered by importance, then arrival; both are fixed for its life."""

    key: tuple[int, int]
    coordinator: Coordinator
    running: bool = False

    def __lt__(self, other: _Entry) -> bool:
        return self.key < other.key


class _Step:
    """The step being made: grants in order, and what is left of the budget."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.tokens_left = config.max_num_batched_tokens
        self.rows_left = config.max_num_seqs
        self.grants: dict[int, Grant] = {}  # by sequence id
        # A copy stays in the step even when the grant that needed it is taken back: the table already names its target.
        # If the target was freed instead, whoever got it writes it after all copies.
        self.copies: list[BlockCopy] = []

    def add(self, grant: Grant) -> None:
        self.grants[grant.sequence.id] = grant
        self.tokens_left -= grant.num_tokens
        self.rows_left -= 1

    def remove(self, sequence: Sequence) -> None:
        grant = self.grants.pop(sequence.id, None)
        if grant is not None:
            self.tokens_left += grant.num_tokens
            self.rows_left += 1


class Scheduler:
    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, events: EventRing) -> None:
        self.config = config
        self.kv = kv
        self._events = events
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._entries: dict[str, _Entry] = {}
        self._arrivals = count()
        self._num_steps = 0
        self._head_waits: tuple[str, Reason] | None = None  # so that a wait is an event once, not every step

    # --- queues ---

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def coordinators(self) -> Iterator[Coordinator]:
        return (entry.coordinator for entry in self._entries.values())

    def in_order(self, request_ids: Iterable[str]) -> list[Coordinator]:
        """The requests of these ids, as they arrived."""
        entries = sorted((self._entries[request_id] for request_id in request_ids), key=lambda entry: entry.key[1])
        return [entry.coordinator for entry in entries]

    def add(self, coordinator: Coordinator) -> None:
        """Queue a request. Raises InvalidRequestError for one whose sequences must all run in one step and cannot."""
        if coordinator.lockstep and coordinator.width > self.config.max_num_seqs:
            raise InvalidRequestError(
                "width", f"{coordinator.width} sequences in lockstep do not fit max_num_seqs={self.config.max_num_seqs}"
            )
        priority = coordinator.priority if self.config.policy == "priority" else 0
        entry = _Entry((priority, next(self._arrivals)), coordinator)
        self._entries[coordinator.request_id] = entry
        insort(self._waiting, entry)

    def remove(self, coordinator: Coordinator) -> None:
        """The request has ended; its blocks go home."""
        entry = self._entries.pop(coordinator.request_id)
        (self._running if entry.running else self._waiting).remove(entry)
        coordinator.drop_all()

    # --- one step ---

    def schedule(self) -> StepPlan:
        """The next step; it is empty when nothing can or needs to run."""
        step = _Step(self.config)
        for entry in self._running:
            settle_shares(entry.coordinator, self.kv, self._events)
        for single in (True, False):
            for entry in tuple(self._running):
                for unit in self._units(entry.coordinator):
                    if (unit[0].num_pending == 1) == single:
                        self._grant(step, entry, unit)
        self._admit(step)
        plan = StepPlan(self._num_steps, tuple(step.grants.values()), tuple(step.copies))
        if plan:
            self._num_steps += 1
            self._events.step = self._num_steps
        return plan

    def _units(self, coordinator: Coordinator) -> list[list[Sequence]]:
        """What can be granted by itself: each sequence, or in lockstep all together that stand at their last row."""
        pending = [s for s in coordinator.sequences if s.num_pending and s.share is None]
        if not coordinator.lockstep or len(coordinator.sequences) == 1:
            return [[sequence] for sequence in pending]
        behind = [[sequence] for sequence in pending if sequence.num_pending > 1]
        if behind or any(s.share is not None for s in coordinator.sequences):
            return behind  # rows that stand ready wait for those being restored
        return [pending] if pending else []

    def _grant(self, step: _Step, entry: _Entry, unit: list[Sequence]) -> None:
        """Grant all of a unit or nothing of it."""
        if not entry.running or any(sequence.share is not None for sequence in unit):
            return  # preempted, or part of it evicted, earlier in this very step
        if len(unit) > min(step.rows_left, step.tokens_left):
            return
        coordinator = entry.coordinator
        holds_row_back = coordinator.lockstep and len(coordinator.sequences) > 1
        for sequence in unit:
            pending = sequence.num_pending
            if holds_row_back and pending > 1:
                pending -= 1  # the wanted row waits for the others'
            most = self.config.max_chunk_tokens or step.tokens_left
            stop = sequence.num_computed + min(pending, step.tokens_left, most)
            while (copies := self.kv.allocate(sequence.block_table, sequence.num_computed, stop)) is None:
                if not self._reclaim(step, entry, sequence):
                    for granted in unit:
                        step.remove(granted)
                    return
            step.copies += copies
            step.add(
                Grant(
                    request_id=coordinator.request_id,
                    sequence=sequence,
                    token_ids=sequence.token_ids,
                    start=sequence.num_computed,
                    stop=stop,
                    block_table=tuple(sequence.block_table[: self.kv.blocks_for(stop)]),
                    want=sequence.want if stop == sequence.num_tokens else None,
                    each_row=sequence.each_row,
                )
            )

    # --- admission ---

    def _admit(self, step: _Step) -> None:
        while self._waiting:
            entry = self._waiting[0]
            coordinator = entry.coordinator
            settle_shares(coordinator, self.kv, self._events)
            reason = self._why_not(step, coordinator)
            if reason is not None:
                if self._head_waits != (coordinator.request_id, reason):
                    self._head_waits = (coordinator.request_id, reason)
                    self._events.emit(EventKind.WAITING, coordinator.request_id, reason)
                return
            self._waiting.pop(0)
            insort(self._running, entry)
            entry.running = True
            kind = EventKind.RESTORED if coordinator.metrics.num_preemptions else EventKind.ADMITTED
            self._events.emit(kind, coordinator.request_id)
            for unit in self._units(coordinator):
                self._grant(step, entry, unit)

    def _why_not(self, step: _Step, coordinator: Coordinator) -> Reason | None:
        """Why a waiting request cannot run yet; None when it can."""
        if not self._running:
            return None
        places = sum(entry.coordinator.width for entry in self._running)
        if places + coordinator.width > self.config.max_num_seqs:
            return Reason.MAX_NUM_SEQS
        if step.tokens_left < 1 or step.rows_left < 1:
            return Reason.TOKEN_BUDGET
        # Its whole pending work must fit now, and a block more for everybody running: to admit a request only to
        # preempt it a few steps later computes its prompt twice. Each time that happened it waits for more.
        needed = places * (1 + coordinator.metrics.num_preemptions)
        for sequence in coordinator.sequences:
            if sequence.share is None:
                needed += self.kv.blocks_missing(sequence.block_table, sequence.num_computed, sequence.target)
            else:  # full blocks come from the sibling
                needed += self.kv.blocks_for(sequence.target) - sequence.share[1] // self.kv.block_size
        return Reason.NO_BLOCKS if needed > self.kv.num_free else None

    # --- blocks run out ---

    def _reclaim(self, step: _Step, entry: _Entry, wanting: Sequence) -> bool:
        """Free some blocks for `wanting`; False when it has to do without in this step.

        First idle sequences give way, then whole requests from the newest and least important on, at last the later
        sequences of the request itself when it is the oldest: its first sequence always gets what it needs.
        """
        for other in reversed(self._running):
            for sequence in reversed(other.coordinator.sequences):
                if sequence.block_table and not sequence.num_pending and sequence is not wanting:
                    self._evict(step, other, sequence, Reason.IDLE)
                    return True
        victim = self._running[-1]
        if victim is not self._running[0]:
            self._preempt(step, victim)
            return victim is not entry
        if entry.coordinator.lockstep:
            return False
        for sequence in reversed(entry.coordinator.sequences):
            if sequence is wanting:
                return False
            if sequence.block_table:
                self._evict(step, entry, sequence, Reason.NO_BLOCKS)
                return True
        return False

    def _preempt(self, step: _Step, entry: _Entry) -> None:
        coordinator = entry.coordinator
        remember_shares(coordinator.sequences)
        for sequence in coordinator.sequences:
            step.remove(sequence)
            sequence.evict()
        coordinator.metrics.num_preemptions += 1
        self._running.remove(entry)
        entry.running = False
        insort(self._waiting, entry)
        reason = Reason.HIGHER_PRIORITY if entry.key[0] > self._running[0].key[0] else Reason.NO_BLOCKS
        self._events.emit(EventKind.PREEMPTED, coordinator.request_id, reason)

    def _evict(self, step: _Step, entry: _Entry, sequence: Sequence, reason: Reason) -> None:
        """Take the blocks of one sequence; what it shares with an earlier sibling comes back from there."""
        step.remove(sequence)
        siblings = entry.coordinator.sequences
        remember_shares(siblings[: siblings.index(sequence) + 1], only=sequence)
        sequence.evict()
        self._events.emit(EventKind.EVICTED, entry.coordinator.request_id, reason, f"sequence {sequence.id}")
