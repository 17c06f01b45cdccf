"""What the engine did lately, for /debug/timeline: steps, and what each request was at, in a ring of bounded size.

`Timeline` listens in the engine's process, if it is asked to; `chrome_trace` makes of what it kept the form that
Perfetto (ui.perfetto.dev) and Chrome's tracing read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from octavo.core.events import Event, EventKind
from octavo.core.want import Sample, TopK

if TYPE_CHECKING:
    from octavo.core.plan import Grant, StepPlan, StepResult
    from octavo.wiring import BuiltEngine

SECONDS = 60.0  # that are kept
_IDLE = 0.05  # seconds without a step of its own, after which a request is told to be idle
_MOST = 20_000  # of steps, of phases and of moments: beyond, the oldest are forgotten

# What a request is at from then on; None: at nothing, it has ended.
_PHASES: dict[EventKind, str | None] = {
    EventKind.QUEUED: "queued",
    EventKind.ADMITTED: "prefilling",
    EventKind.RESTORED: "prefilling",
    EventKind.PREEMPTED: "preempted",
    EventKind.FINISHED: None,
    EventKind.FAILED: None,
}


class Step(NamedTuple):
    """Times are in seconds, on the engine's clock."""

    start: float
    end: float
    number: int
    rows: int
    prefill_tokens: int
    decode_tokens: int
    num_copies: int
    num_loads: int
    blocks_in_use: int
    running: int
    waiting: int
    timings: dict[str, float]  # seconds by part, in their order


class Phase(NamedTuple):
    serial: int  # of the request: its id may be that of a later one
    request_id: str
    name: str
    start: float
    end: float  # of one that lasts, its start
    reason: str = ""  # why it ended


class Moment(NamedTuple):
    serial: int | None  # None: of no request that lives
    name: str
    at: float
    reason: str
    detail: str


class Snapshot(NamedTuple):
    start: float
    now: float
    steps: list[Step]
    phases: list[Phase]
    moments: list[Moment]


class Timeline:
    """Written to by the engine's thread, read by any."""

    def __init__(self, built: BuiltEngine) -> None:
        self._engine = engine = built.engine
        self._clock = engine.clock
        self._steps: deque[Step] = deque(maxlen=_MOST)
        self._phases: deque[Phase] = deque(maxlen=_MOST)
        self._moments: deque[Moment] = deque(maxlen=_MOST)
        self._now: dict[str, Phase] = {}  # by request id
        self._seen: dict[str, float] = {}  # by request id: the end of the last step that it had a part in
        self._stepping: frozenset[str] = frozenset()  # those that have one in the step under way
        self._num_requests = 0
        self._step_began = 0.0
        self._began = self._clock()
        engine.plan_listeners.append(self._begin_step)
        engine.step_listeners.append(self._end_step)
        engine.events.subscribe(self._note)

    def _begin_step(self, plan: StepPlan) -> None:
        self._stepping = frozenset(grant.request_id for grant in plan.grants)
        self._step_began = self._clock()

    def _end_step(self, plan: StepPlan, result: StepResult) -> None:
        now = self._clock()
        drawing = [grant for grant in plan.grants if _draws(grant)]
        decoded = sum(grant.num_tokens for grant in drawing if grant.num_tokens - grant.num_drafts == 1)
        kv, scheduler = self._engine.kv, self._engine.scheduler
        step = Step(
            self._step_began,
            now,
            plan.step,
            len(plan.grants),
            plan.num_tokens - decoded,
            decoded,
            len(plan.copies),
            len(plan.loads),
            kv.num_blocks - kv.num_available,
            scheduler.num_running,
            scheduler.num_waiting,
            result.timings,
        )
        self._steps.append(step)
        self._seen.update(dict.fromkeys(self._stepping, now))
        self._stepping = frozenset()
        for grant in drawing:
            phase = self._now.get(grant.request_id)
            if phase is not None and phase.name == "prefilling":
                self._change(phase, "decoding", now)
        for kept in (self._steps, self._phases):
            while kept and now - kept[0].end > SECONDS:
                kept.popleft()

    def _note(self, event: Event) -> None:
        phase = self._now.get(event.request_id)
        if event.kind not in _PHASES:
            serial = None if phase is None else phase.serial
            self._moments.append(Moment(serial, event.kind, event.time, event.reason, event.detail))
            return
        if phase is not None:
            self._change(phase, _PHASES[event.kind], event.time, event.reason)
        elif event.kind is EventKind.QUEUED:
            self._num_requests += 1
            # A session waits for nothing before it is asked something.
            name = "idle" if self._engine.scheduler.is_parked(event.request_id) else "queued"
            self._now[event.request_id] = Phase(self._num_requests, event.request_id, name, event.time, event.time)

    def _change(self, phase: Phase, name: str | None, at: float, reason: str = "") -> None:
        ended = self._until(phase, at, reason)
        if name == phase.name and len(ended) == 1:  # it goes on
            return
        self._phases += ended
        if name is None:
            del self._now[phase.request_id]
            self._seen.pop(phase.request_id, None)
        else:
            self._now[phase.request_id] = phase._replace(name=name, start=at, end=at)

    def _until(self, phase: Phase, at: float, reason: str = "") -> list[Phase]:
        """As it was up to now: a request that had no part in steps at the end was idle then, such as a session between
        two calls."""
        ended = phase._replace(end=at, reason=reason)
        seen = max(phase.start, self._seen.get(phase.request_id, phase.start))
        busy = phase.name not in ("prefilling", "decoding") or phase.request_id in self._stepping
        if busy or at - seen <= _IDLE:
            return [ended]
        return [phase._replace(end=seen), ended._replace(name="idle", start=seen)]

    def snapshot(self, seconds: float) -> bytes:
        """The last `seconds`, for `chrome_trace`. It asks nothing of the engine's thread, which may stand still."""
        now = self._clock()
        start = max(self._began, now - min(seconds, SECONDS))
        phases = _copied(self._phases)
        for phase in _copied(self._now.values()):
            phases += self._until(phase, now)
        return msgspec.msgpack.encode(
            Snapshot(
                start,
                now,
                [step for step in _copied(self._steps) if step.end > start],
                [phase for phase in phases if phase.end >= start],
                [moment for moment in _copied(self._moments) if moment.at >= start],
            )
        )


def _draws(grant: Grant) -> bool:
    return any(isinstance(wanted.want, Sample | TopK) for wanted in grant.wants)


def _copied(kept: Any) -> list[Any]:
    """While the engine's thread may add to it."""
    while True:
        try:
            return list(kept)
        except RuntimeError:  # it did
            continue


# --- as Chrome and Perfetto read it ---


def chrome_trace(data: bytes) -> dict[str, Any]:
    """Steps as slices of one track, requests as asynchronous slices with their phases in them, and counters. Times are
    microseconds from the beginning of the window."""
    told = msgspec.msgpack.decode(data, type=Snapshot)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "octavo engine"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "steps"}},
    ]
    found = [*_of_steps(told), *_of_requests(told), *_of_moments(told)]
    events += sorted(found, key=lambda one: one["ts"])  # of equal times in this order
    began = datetime.now(UTC) - timedelta(seconds=told.now - told.start)
    other = {"began": began.isoformat(), "seconds": round(told.now - told.start, 6)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _of_steps(told: Snapshot) -> Iterator[dict[str, Any]]:
    track = {"ph": "X", "cat": "step", "pid": 1, "tid": 1}
    for step in told.steps:
        start, end = _time(told, step.start), _time(told, step.end)
        counts = {"rows": step.rows, "prefill_tokens": step.prefill_tokens, "decode_tokens": step.decode_tokens}
        moved = {"copied_blocks": step.num_copies, "loaded_blocks": step.num_loads}
        args = {"step": step.number, **counts, "blocks_in_use": step.blocks_in_use, **moved}
        yield {**track, "name": "step", "ts": start, "dur": _rounded(end - start), "args": args}
        began = step.start
        for name, seconds in step.timings.items():
            at, until = _time(told, began), _time(told, min(step.end, began + seconds))
            if at < until:  # in the window
                yield {**track, "name": name, "ts": at, "dur": _rounded(until - at)}
            began += seconds
        counter = {"ph": "C", "pid": 1, "tid": 1, "ts": end}
        yield {**counter, "name": "KV blocks in use", "args": {"blocks": step.blocks_in_use}}
        yield {**counter, "name": "requests", "args": {"running": step.running, "waiting": step.waiting}}


def _of_requests(told: Snapshot) -> Iterator[dict[str, Any]]:
    by_request: dict[int, list[Phase]] = {}
    for phase in told.phases:
        by_request.setdefault(phase.serial, []).append(phase)
    for serial, phases in by_request.items():
        phases.sort(key=lambda phase: phase.start)
        track = {"cat": "request", "id": serial, "pid": 1, "tid": 1}
        name = phases[0].request_id
        yield {**track, "ph": "b", "name": name, "ts": _time(told, phases[0].start), "args": {"request_id": name}}
        for phase in phases:
            yield {**track, "ph": "b", "name": phase.name, "ts": _time(told, phase.start)}
            end = _time(told, phase.end)
            yield {**track, "ph": "e", "name": phase.name, "ts": end, "args": {"reason": phase.reason}}
        yield {**track, "ph": "e", "name": name, "ts": end}


def _of_moments(told: Snapshot) -> Iterator[dict[str, Any]]:
    alive = {phase.serial for phase in told.phases}
    for moment in told.moments:
        one = {"name": moment.name, "ts": _time(told, moment.at), "pid": 1, "tid": 1}
        args = {"reason": moment.reason, "detail": moment.detail}
        if moment.serial in alive:
            yield {**one, "ph": "n", "cat": "request", "id": moment.serial, "args": args}
        else:
            yield {**one, "ph": "i", "s": "t", "cat": "engine", "args": args}


def _time(told: Snapshot, at: float) -> float:
    """Microseconds from the beginning of the window, and inside it."""
    return _rounded((min(max(at, told.start), told.now) - told.start) * 1e6)


def _rounded(microseconds: float) -> float:
    return round(microseconds, 3)
