"""The scheduler has no phases.

A sequence has pending positions. Each step grants tokens under a budget, and all that is granted runs as one ragged
batch. Chunked prefill, continuous batching, preemption and restoring are all this one rule. Order within a step:

1. running sequences that generate, so that they go on in every step;
2. running sequences with more, in the order of their requests;
3. waiting requests, in order, none overtaking another, while places, tokens and blocks last.

When blocks run out, whole requests are preempted, the newest and least important first and never the oldest, so the
oldest always ends and so does everyone after it. What was preempted waits in its old place in the queue, and finds its
KV in the prefix cache as far as it was not evicted; what its forks shared is computed once, by the first of them.

What is cached is taken, not computed. Of several sequences about to compute the same block, the first granted in a step
computes it and the others wait for the next step. That is no lock: if the first ends, the next one computes. A block
that is on its way from the tier is waited for likewise.
Waiting requests with more of their prompt cached may pass others, a bounded number of times.

Whatever raises while a request is looked at ends that request alone.

A request of which nothing is asked (a session between two calls) is parked: it has no place in the queues and keeps its
blocks until somebody needs them. When something is asked of it, it queues as one that arrives then. One that goes on by
itself (`keeps_idle`: it waits for text to be tokenised, or for its own other sequences) keeps its turn, and gives its
idle blocks last.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count

from octavo.core.coordinator import Coordinator
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, EventRing, Reason
from octavo.core.grammar import GrammarState
from octavo.core.plan import BlockCopy, Grant, StepPlan
from octavo.core.proposer import NO_DRAFT, Asked, Draft, Proposer
from octavo.core.sequence import Sequence
from octavo.core.want import Sample
from octavo.kv_cache import CachedPrefix, KVCacheManager, PendingKV

log = logging.getLogger(__name__)

_LOOK_AHEAD = 64  # waiting requests among which the one with the longest cached prefix is looked for


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int  # most sequences in a step
    max_num_batched_tokens: int  # most tokens in a step
    max_chunk_tokens: int | None = None  # most tokens of one sequence in a step
    policy: str = "fcfs"  # or "priority"
    max_overtakes: int = 16  # how often later requests, with more cached, may be admitted before a waiting one

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence may decode in every step"
            )


@dataclass(slots=True, eq=False)
class _Entry:
    """A request in the queues. Ordered by importance, then arrival; both are fixed while it is in them."""

    key: tuple[int, int]
    coordinator: Coordinator
    running: bool = False
    preempted: int = 0  # times, since it arrived
    overtaken: int = 0  # later requests admitted before it for their cached prefixes
    keeps_turn: bool = False  # when it was parked it waited for something: it goes on as if it had stood in the queue
    cached: CachedPrefix | None = None  # how far its prompt was found in the cache when it was last looked up

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
        self.computing: dict[Hashable, Sequence] = {}  # the next block of each sequence that is granted a prefill
        self.following: set[int] = set()  # ids of sequences that wait for a block of another's
        self.drafts: dict[int, Draft] = {}  # by sequence id: what may follow it
        self.reclaimed = False  # whether somebody had to give blocks, and may have other work now

    def add(self, grant: Grant) -> None:
        self.grants[grant.sequence_id] = grant
        self.tokens_left -= grant.num_tokens
        self.rows_left -= 1

    def remove(self, sequence: Sequence) -> None:
        grant = self.grants.pop(sequence.id, None)
        if grant is not None:
            self.tokens_left += grant.num_tokens
            self.rows_left += 1


class Scheduler:
    """`proposer` guesses tokens of sequences that generate, to be verified with the row before them."""

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, events: EventRing, proposer: Proposer | None = None
    ) -> None:
        self.config = config
        self.kv = kv
        self._proposer = proposer
        self._events = events
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._parked: dict[str, _Entry] = {}  # by request id, the one parked longest ago first
        self._entries: dict[str, _Entry] = {}
        self._arrivals = count()
        self._num_steps = 0
        self.waits_for_loads = False  # whether somebody did in the last step
        self.broken: list[
            tuple[Coordinator, str]
        ] = []  # requests to be ended, and why: the last step could not use them
        # So that a wait is an event once, not every step.
        self._head_waits: tuple[str, Reason] | None = None
        self._following: set[int] = set()

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
        """Queue a request. Raises InvalidRequestError for one that could never run to its end."""
        if coordinator.lockstep and coordinator.width > self.config.max_num_seqs:
            raise InvalidRequestError(
                "width", f"{coordinator.width} sequences in lockstep do not fit max_num_seqs={self.config.max_num_seqs}"
            )
        if (least := coordinator.least_blocks(self.kv.block_size)) > self.kv.num_blocks:
            raise InvalidRequestError(
                "width",
                f"{coordinator.width} sequences in lockstep take at least {least} KV blocks of {self.kv.block_size} "
                f"tokens at their full length, and there are {self.kv.num_blocks}",
            )
        priority = coordinator.priority if self.config.policy == "priority" else 0
        entry = _Entry((priority, next(self._arrivals)), coordinator)
        self._entries[coordinator.request_id] = entry
        insort(self._waiting, entry)

    def remove(self, coordinator: Coordinator) -> None:
        """The request has ended; its blocks go home."""
        entry = self._entries.pop(coordinator.request_id)
        self._leave_queue(entry)
        coordinator.drop_all()
        if self._proposer is not None:
            self._proposer.forget(coordinator.request_id)
        self.kv.end_request(coordinator.request_id, coordinator.namespace)

    def stalled(self) -> Coordinator | None:
        """Who is to blame when there is work and an empty step: the first of those that run. Everything that others had
        was taken for it, and it does not fit."""
        return next((e.coordinator for e in self._running if any(s.num_pending for s in e.coordinator.sequences)), None)

    def settle(self, coordinator: Coordinator) -> None:
        """Verbs were called between steps: park a request that wants nothing now, queue one that wants something."""
        entry = self._entries[coordinator.request_id]
        wants = any(sequence.num_pending for sequence in coordinator.sequences)
        parked = coordinator.request_id in self._parked
        if wants and parked:
            self._leave_queue(entry)
            if not entry.keeps_turn:
                entry.key = (entry.key[0], next(self._arrivals))
                entry.preempted = entry.overtaken = 0
            insort(self._waiting, entry)
        elif not wants and not parked:
            self._leave_queue(entry)
            entry.running = False
            self._parked[coordinator.request_id] = entry
        if not wants:
            entry.keeps_turn = coordinator.keeps_idle
        entry.cached = None  # of tokens that may be others now

    def _leave_queue(self, entry: _Entry) -> None:
        if self._parked.pop(entry.coordinator.request_id, None) is None:
            (self._running if entry.running else self._waiting).remove(entry)

    def is_parked(self, request_id: str) -> bool:
        """Whether nothing is asked of it."""
        return request_id in self._parked

    # --- one step ---

    def schedule(self) -> StepPlan:
        """The next step; it is empty when nothing can or needs to run."""
        step = _Step(self.config)
        self.broken = []
        self.waits_for_loads = False
        for entry in tuple(self._running):
            try:
                self._take_cached(entry.coordinator)
                if not any(sequence.num_pending for sequence in entry.coordinator.sequences):  # else it stays here
                    self.settle(entry.coordinator)
            except Exception as error:
                self._break(step, entry, error)
        if self._proposer is not None:
            self._propose(step, self._proposer)
        for generating in (True, False):
            others = False  # of the kind that has its turn next
            for entry in tuple(self._running):
                try:
                    for unit in self._units(entry.coordinator):
                        if unit[0].is_generating == generating:
                            self._grant(step, entry, unit)
                        else:
                            others = True
                except Exception as error:
                    self._break(step, entry, error)
            if not others and not step.reclaimed:
                break  # most steps: everybody generates
        self._admit(step)
        self._following = step.following
        plan = StepPlan(self._num_steps, tuple(step.grants.values()), tuple(step.copies), self.kv.take_loads())
        if plan:
            self._num_steps += 1
            self._events.step = self._num_steps
        return plan

    def _break(self, step: _Step, entry: _Entry, error: Exception) -> None:
        """Looking at this request raised: nothing of it runs in this step, and the engine is to end it."""
        log.error("scheduling request %s raised", entry.coordinator.request_id, exc_info=error)
        for sequence in entry.coordinator.sequences:
            step.remove(sequence)
        self._leave_queue(entry)
        entry.running = False
        self._parked[entry.coordinator.request_id] = entry
        self.broken.append((entry.coordinator, f"{type(error).__name__}: {error}"))

    def _units(self, coordinator: Coordinator) -> list[list[Sequence]]:
        """What can be granted by itself: each sequence, or in lockstep all together that stand at their last row."""
        pending = [sequence for sequence in coordinator.by_urgency if sequence.num_pending]
        if not coordinator.lockstep or len(coordinator.sequences) == 1:
            return [[sequence] for sequence in pending]
        behind = [[sequence] for sequence in pending if sequence.is_prefilling]
        return behind or ([pending] if pending else [])  # rows that stand ready wait for those being restored

    def _take_cached(self, coordinator: Coordinator) -> None:
        """Let the cache answer what it can of the pending work. A wanted row is always computed."""
        hit = False
        for sequence in coordinator.sequences:
            if not sequence.is_prefilling:
                continue
            limit = min(sequence.first_wanted_row, sequence.target)
            table, before = sequence.block_table, sequence.num_computed
            computed = self.kv.match(table, sequence.token_ids, before, limit)
            if computed == before:
                continue
            sequence.commit(computed)
            metrics = coordinator.metrics
            if not metrics.num_generated_tokens and not metrics.num_preemptions:
                metrics.num_cached_tokens += computed - before
            detail = f"sequence {sequence.id}: positions {before} to {computed}"
            self._events.emit(EventKind.CACHE_HIT, coordinator.request_id, detail=detail)
            hit = True
        if hit:
            coordinator.go_on()
            self._take_cached(coordinator)  # of sequences that it has made

    def _follows(self, step: _Step, entry: _Entry, sequence: Sequence) -> bool:
        """Whether the block that this sequence needs next is on its way: computed by another one in this step, or
        loaded."""
        if not sequence.is_prefilling:
            return False
        if self.kv.awaits_load(sequence.block_table):
            # It takes a block, like one that is computed: whoever waits for it makes room.
            if self.kv.num_available or self._reclaim(step, entry, sequence):
                self.waits_for_loads = True
                self._wait_for(step, entry, sequence, Reason.LOADING, "waits for a block that is being read")
                return True
            if not entry.running:  # what gave way was the request itself
                return True
        # A last row alone may lie in a cached block: it is then computed in a copy.
        target = sequence.target if sequence.first_wanted_row >= sequence.target - 1 else sequence.first_wanted_row
        block = self.kv.pending_block(sequence.block_table, sequence.token_ids, target)
        if block is None:
            return False
        leader = step.computing.setdefault(block, sequence)
        if leader is sequence or leader.id not in step.grants:
            step.computing[block] = sequence
            return False
        self._wait_for(step, entry, sequence, Reason.SHARED_PREFIX, f"waits for sequence {leader.id}")
        return True

    def _wait_for(self, step: _Step, entry: _Entry, sequence: Sequence, reason: Reason, detail: str) -> None:
        step.following.add(sequence.id)
        if sequence.id not in self._following:
            detail = f"sequence {sequence.id} {detail}"
            self._events.emit(EventKind.WAITING, entry.coordinator.request_id, reason, detail)

    def _grant(self, step: _Step, entry: _Entry, unit: list[Sequence]) -> None:
        """Grant all of a unit or nothing of it."""
        if not entry.running or (len(unit) > 1 and not all(sequence.is_generating for sequence in unit)):
            return  # preempted, or part of it evicted, earlier in this very step
        if len(unit) > min(step.rows_left, step.tokens_left) or self._follows(step, entry, unit[0]):
            return
        coordinator = entry.coordinator
        holds_row_back = coordinator.lockstep and len(coordinator.sequences) > 1
        for sequence in unit:
            start, num_pending = sequence.num_computed, sequence.num_pending
            most = step.tokens_left
            if num_pending > 1:
                for limit in (self.config.max_chunk_tokens, coordinator.max_chunk_tokens):
                    if limit is not None:
                        most = min(most, limit)
                if holds_row_back and sequence.is_prefilling and sequence.target == sequence.num_tokens:
                    most = min(most, num_pending - 1)  # the wanted row waits for the others'
            stop = start + min(num_pending, most)
            draft = NO_DRAFT
            if step.drafts and sequence.is_generating:  # a token is left for each row that may still come
                draft = step.drafts.get(sequence.id, NO_DRAFT).first(max(step.tokens_left - step.rows_left, 0))
            copies = self._allocate_with_guesses(sequence, start, stop, draft)
            if copies is None and draft.lookahead_slots:
                draft = draft._replace(lookahead=0, lookahead_slots=0)
                copies = self._allocate_with_guesses(sequence, start, stop, draft)
            if copies is None:  # nobody makes room for guesses
                draft = draft.first(0) if draft.token_ids else draft
                while (copies := self.kv.allocate(sequence.block_table, start, stop)) is None:
                    # What is copied takes a block more than what is computed anew.
                    kept = self.kv.give_part_back(sequence.block_table, start) if len(unit) == 1 else start
                    if kept < start:
                        sequence.recompute(kept)
                        start, stop = kept, min(stop, kept + most)
                    elif not self._reclaim(step, entry, sequence):
                        for granted in unit:
                            step.remove(granted)
                        return
            drafts = draft.token_ids
            end = stop + len(drafts)
            step.copies += copies
            step.add(
                Grant(
                    request_id=coordinator.request_id,
                    sequence_id=sequence.id,
                    start=start,
                    stop=end,
                    token_ids=(*sequence.token_ids[start:stop], *drafts),
                    block_table=tuple(sequence.block_table[: self.kv.blocks_for(end + draft.lookahead_slots)]),
                    wants=sequence.wants_within(start, stop, draft.paths()),
                    num_lookahead=draft.lookahead,
                    num_drafts=len(drafts),
                    draft_parents=draft.parents,
                )
            )

    def _allocate_with_guesses(
        self, sequence: Sequence, start: int, stop: int, draft: Draft
    ) -> tuple[BlockCopy, ...] | None:
        """None as well where it has none that take slots."""
        slots = len(draft.token_ids) + draft.lookahead_slots
        return self.kv.allocate(sequence.block_table, start, stop + slots) if slots else None

    def _propose(self, step: _Step, proposer: Proposer) -> None:
        """Have tokens guessed for sequences that draw one token next."""
        asked: list[Asked] = []
        num_rows = num_drawing = 0
        for entry in self._running:
            coordinator = entry.coordinator
            for sequence in coordinator.sequences:
                if not (pending := sequence.num_pending):
                    continue
                num_rows += pending
                if not sequence.is_generating:
                    continue
                num_drawing += 1
                if len(sequence.wants) != 1 or not isinstance(want := sequence.wants[0].want, Sample):
                    continue
                if want.max_drafts and len(want.draws) == 1:
                    names = coordinator.request_id, coordinator.namespace
                    asked.append(Asked(sequence, *names, want.max_drafts))
        try:
            if asked and step.tokens_left > step.rows_left:  # else there is no token for a guess
                drafts = proposer.propose(asked, min(num_rows, step.tokens_left), num_drawing)
                of_id = {one.sequence.id: one for one in asked}
                step.drafts = {n: _possible(of_id[n].sequence, d.first(of_id[n].max_drafts)) for n, d in drafts.items()}
        except Exception:
            log.exception("guessing raised; step %d goes on without", self._num_steps)

    # --- admission ---

    def _admit(self, step: _Step) -> None:
        while self._waiting:
            entry = self._next_waiting(step)
            if entry is None:
                continue
            try:
                admitted = self._admit_one(step, entry)
            except Exception as error:
                self._break(step, entry, error)
                continue
            if not admitted:
                return

    def _admit_one(self, step: _Step, entry: _Entry) -> bool:
        """Let a waiting request run, if it can now."""
        coordinator = entry.coordinator
        reason = self._why_not(step, entry)
        while reason is Reason.NO_BLOCKS and self._evict_idle(step, spared=coordinator.sequences):
            reason = self._why_not(step, entry)
        if reason is not None:
            if self._head_waits != (coordinator.request_id, reason):
                self._head_waits = (coordinator.request_id, reason)
                self._events.emit(EventKind.WAITING, coordinator.request_id, reason)
            return False
        index = self._waiting.index(entry)
        for passed in self._waiting[:index]:
            passed.overtaken += 1
        self._waiting.pop(index)
        insort(self._running, entry)
        entry.running = True
        kind = EventKind.RESTORED if entry.preempted else EventKind.ADMITTED
        self._events.emit(kind, coordinator.request_id)
        self.kv.stats.query_tokens += sum(sequence.num_pending for sequence in coordinator.sequences)
        self._take_cached(coordinator)
        for unit in self._units(coordinator):
            self._grant(step, entry, unit)
        return True

    def _next_waiting(self, step: _Step) -> _Entry | None:
        """The request to admit next: the one with the longest cached prefix if it fits, the first among equals; else
        the head of the queue, whose turn it is. None: none of those looked at can go on.

        Only requests of the same importance are passed, none that was preempted, and none more than `max_overtakes`
        times.
        """
        head = self._waiting[0]
        if not self._running or step.rows_left < 1 or step.tokens_left < 1:  # all wait for the same
            return head
        best, longest, before = None, -1, None
        for entry in self._waiting[:_LOOK_AHEAD]:
            if before is not None and (before.overtaken >= self.config.max_overtakes or before.preempted):
                break
            if entry.key[0] != head.key[0]:
                break
            before = entry
            try:
                length = self._cached_blocks(entry)
                if length > longest and (entry is head or self._why_not(step, entry) is None):
                    best, longest = entry, length
            except Exception as error:
                self._break(step, entry, error)
        return best

    def _cached_blocks(self, entry: _Entry) -> int:
        """Blocks of a waiting request's first sequence that are cached now."""
        for sequence in self._without_blocks(entry.coordinator)[:1]:
            entry.cached = self.kv.cached_prefix(sequence.block_table, sequence.token_ids, entry.cached)
        return 0 if entry.cached is None else entry.cached.num_blocks

    def _why_not(self, step: _Step, entry: _Entry) -> Reason | None:
        """Why a waiting request cannot run yet; None when it can."""
        if not self._running:
            return None
        coordinator = entry.coordinator
        places = sum(running.coordinator.width for running in self._running)
        if places + coordinator.width > self.config.max_num_seqs:
            return Reason.MAX_NUM_SEQS
        if step.tokens_left < 1 or step.rows_left < 1:
            return Reason.TOKEN_BUDGET
        # Its whole pending work must fit now, and a block more for everybody running: to admit a request only to
        # preempt it a few steps later computes its prompt twice. Each time that happened it waits for more.
        needed = places * (1 + entry.preempted) + self.kv.blocks_needed(_pending_kv(coordinator))
        if needed > self.kv.num_available:
            self._cached_blocks(entry)
            # What others hold costs nothing; what is cached and idle counts as available until it is taken.
            needed -= 0 if entry.cached is None else entry.cached.num_in_use
        return Reason.NO_BLOCKS if needed > self.kv.num_available else None

    def _without_blocks(self, coordinator: Coordinator) -> list[Sequence]:
        """Sequences with pending work that are to be computed from the start; of most waiting requests that is all."""
        return [sequence for sequence in coordinator.sequences if sequence.num_pending and not sequence.block_table]

    # --- blocks run out ---

    def _reclaim(self, step: _Step, entry: _Entry, wanting: Sequence) -> bool:
        """Free some blocks for `wanting`; False when it has to do without in this step.

        First idle sequences give way, then whole requests from the newest and least important on, at last the later
        sequences of the request itself when it is the oldest: its first sequence always gets what it needs.
        """
        step.reclaimed = True
        if self._evict_idle(step, spared=(wanting,)):
            return True
        victim = self._running[-1]
        if victim is not self._running[0]:
            self._preempt(step, victim)
            return victim is not entry
        if not entry.coordinator.lockstep:
            for sequence in reversed(entry.coordinator.sequences):
                if sequence is wanting:
                    break
                if sequence.block_table:
                    self._evict(step, entry, sequence, Reason.NO_BLOCKS)
                    return True
        return self._evict_idle(step, spared=(wanting,), kept=True)

    def _evict_idle(self, step: _Step, spared: SequenceOf[Sequence], kept: bool = False) -> bool:
        """Take the blocks of one sequence that has nothing to do now and is not spared; False if there is none.

        First of parked requests, the one parked longest ago first, then of waiting ones, then of those that run. Those
        of requests that go on by themselves only if these are `kept` no longer.
        """
        for entry in (*self._parked.values(), *reversed(self._waiting), *reversed(self._running)):
            if entry.coordinator.keeps_idle and not kept:
                continue
            for sequence in reversed(entry.coordinator.sequences):
                busy = entry.running and sequence.num_pending
                if sequence.block_table and not busy and sequence not in spared:
                    self._evict(step, entry, sequence, Reason.IDLE)
                    return True
        return False

    def _preempt(self, step: _Step, entry: _Entry) -> None:
        coordinator = entry.coordinator
        for sequence in coordinator.sequences:
            step.remove(sequence)
            sequence.evict()
        coordinator.metrics.num_preemptions += 1
        entry.preempted += 1
        self._running.remove(entry)
        entry.running = False
        entry.cached = None
        insort(self._waiting, entry)
        reason = Reason.HIGHER_PRIORITY if entry.key[0] > self._running[0].key[0] else Reason.NO_BLOCKS
        self._events.emit(EventKind.PREEMPTED, coordinator.request_id, reason)

    def _evict(self, step: _Step, entry: _Entry, sequence: Sequence, reason: Reason) -> None:
        """Take the blocks of one sequence."""
        step.remove(sequence)
        sequence.evict()
        entry.cached = None
        self._events.emit(EventKind.EVICTED, entry.coordinator.request_id, reason, f"sequence {sequence.id}")


def _possible(sequence: Sequence, draft: Draft) -> Draft:
    """What its grammar, if it has one, allows: a row behind a token that may not stand there could not be answered."""
    grammar = sequence.attached(GrammarState)
    if grammar is None or not draft.token_ids:
        return draft
    if not draft.parents:
        return draft.first(grammar.num_allowed(draft.token_ids))
    return draft.only([n for n, path in enumerate(draft.paths()) if grammar.num_allowed(path) == len(path)])


def _pending_kv(coordinator: Coordinator) -> list[PendingKV]:
    """What its sequences still have to compute. What those of a session that was parked hold already, they keep."""
    return [
        PendingKV(sequence.block_table, sequence.token_ids, sequence.num_computed, sequence.target)
        for sequence in coordinator.sequences
        if sequence.num_pending
    ]
