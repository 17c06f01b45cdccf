"""The engine: requests in, outputs out, one step at a time.

`step` is three calls: `scheduler.schedule() -> executor.execute(plan) -> update(results)`. Errors belong to one
request: it ends with a reason, its blocks go home, the engine goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from itertools import count

from octavo.core.coordinator import Coordinator, SequenceResult
from octavo.core.events import EventKind, EventRing, Reason
from octavo.core.outputs import CacheExplanation, RequestOutput
from octavo.core.plan import GrantResult, StepPlan, StepResult
from octavo.core.protocols import Clock, Executor
from octavo.core.sequence import Sequence
from octavo.engine.scheduler import Scheduler, SchedulerConfig
from octavo.kv_cache import KVCacheManager
from octavo.kv_cache.eviction_log import Evicted
from octavo.kv_cache.explain import explain

log = logging.getLogger(__name__)


class Engine:
    """Single-threaded: `add`, `abort` and `step` are called by one thread at a time."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, executor: Executor, clock: Clock) -> None:
        self.clock = clock
        self.kv = kv
        self.events = EventRing(clock)
        self.scheduler = Scheduler(config, kv, self.events)
        kv.on_evict = self._note_eviction
        self._executor = executor
        self._sequence_ids = count()
        self._coordinators: dict[str, Coordinator] = {}
        self.num_steps = 0

    def add(self, coordinator: Coordinator) -> None:
        """Queue a request. Its id must not be in use."""
        if coordinator.request_id in self._coordinators:
            raise ValueError(f"request id {coordinator.request_id!r} is in use")
        self.scheduler.add(coordinator)
        coordinator.start(partial(self._new_sequence, coordinator))
        self.scheduler.settle(coordinator)
        self._coordinators[coordinator.request_id] = coordinator
        self.events.emit(EventKind.QUEUED, coordinator.request_id)

    def _new_sequence(self, coordinator: Coordinator, stream: tuple[int, ...]) -> Sequence:
        table = self.kv.new_table(coordinator.request_id, coordinator.cache_salt, coordinator.reads_cache)
        return Sequence(next(self._sequence_ids), self.kv, self._sequence_ids.__next__, stream, table)

    def _note_eviction(self, evicted: Evicted) -> None:
        detail = f"block {evicted.depth} of its prefix, cached for {evicted.age:.3f} s"
        self.events.emit(EventKind.CACHE_EVICTED, evicted.request_id, Reason(evicted.reason), detail)

    def settle(self, coordinator: Coordinator) -> None:
        """Its verbs were called from outside, between steps: what they ask for is scheduled from now on. Does nothing
        for a request that has ended."""
        if coordinator.request_id in self._coordinators:
            self.scheduler.settle(coordinator)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, at any moment between steps; its last output, or None when it has ended already."""
        coordinator = self._coordinators.get(request_id)
        if coordinator is None:
            return None
        return self._end(coordinator, "abort")

    def reset_prefix_cache(self) -> int:
        """Forget all cached KV; running requests keep what they have. Returns the number of blocks forgotten."""
        return self.kv.reset()

    def explain_cache(self, token_ids: SequenceOf[int], salt: str | None = None) -> CacheExplanation:
        """How much of a prompt is cached now, and why not more."""
        return explain(self.kv, token_ids, salt, self.clock())

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a request waits for steps. One that nothing is asked of (a session between two calls) does not."""
        return bool(self.scheduler.num_waiting or self.scheduler.num_running)

    @property
    def num_requests(self) -> int:
        return len(self._coordinators)

    def step(self) -> list[RequestOutput]:
        """Run one step; what is new for users, in the order in which the requests were added."""
        plan = self.scheduler.schedule()
        if not plan:
            return self._end_stalled()
        self.num_steps += 1
        now = self.clock()
        for coordinator in self._requests_of(plan):
            if coordinator.metrics.first_scheduled_time is None:
                coordinator.metrics.first_scheduled_time = now
        result = self._execute(plan)
        self._learn_speed(plan, result)
        return self._update(plan, result)

    def _learn_speed(self, plan: StepPlan, result: StepResult) -> None:
        """How long a block of a prompt takes to compute: what a cached one has to be faster than."""
        seconds = result.timings.get("model")
        if seconds is not None and plan.num_tokens >= self.kv.block_size * max(len(plan.grants), 1):
            block = seconds / plan.num_tokens * self.kv.block_size
            known = self.kv.compute_seconds
            self.kv.compute_seconds = block if known is None else 0.8 * known + 0.2 * block

    def _end_stalled(self) -> list[RequestOutput]:
        """Nothing can run. If somebody wants to, the first of them ends with an error: better than waiting for ever."""
        for coordinator in self._coordinators.values():
            if any(sequence.num_pending for sequence in coordinator.sequences):
                tokens = sum(sequence.num_tokens for sequence in coordinator.sequences)
                needs = f"{len(coordinator.sequences)} sequences of {tokens} tokens in all do not fit"
                has = f"{self.kv.num_blocks} blocks of {self.kv.block_size} tokens, {self.scheduler.config}"
                return [self._end(coordinator, "error", f"the request cannot go on: {needs} ({has})")]
        return []

    def close(self) -> list[RequestOutput]:
        """End all requests and the executor."""
        outputs = [self.abort(request_id) for request_id in tuple(self._coordinators)]
        self._executor.close()
        return [output for output in outputs if output is not None]

    # --- executing ---

    def _execute(self, plan: StepPlan) -> StepResult:
        try:
            return self._executor.execute(plan).result()
        except Exception as error:
            # Nothing is committed. Whose fault it was shows when each grant runs by itself.
            log.warning("step %d raised (%r); retrying its %d rows one by one", plan.step, error, len(plan.grants))
            self.events.emit(EventKind.STEP_RETRIED, reason=Reason.STEP_RAISED, detail=repr(error))
            return self._execute_singly(plan)

    def _execute_singly(self, plan: StepPlan) -> StepResult:
        results: list[GrantResult] = []
        try:
            if plan.copies or plan.loads:
                self._executor.execute(replace(plan, grants=())).result()
        except Exception as error:
            failure = GrantResult(error=f"copying KV blocks failed: {error!r}")
            return StepResult((failure,) * len(plan.grants))
        for grant in plan.grants:
            try:
                results += self._executor.execute(replace(plan, grants=(grant,), copies=(), loads=())).result().results
            except Exception as error:
                log.exception("a row of step %d failed by itself", plan.step)
                results.append(GrantResult(error=f"{type(error).__name__}: {error}"))
        return StepResult(tuple(results))

    # --- updating ---

    def _requests_of(self, plan: StepPlan) -> list[Coordinator]:
        """The requests that have a grant in this step, in the order in which they were added."""
        return self.scheduler.in_order({grant.request_id for grant in plan.grants})

    def _update(self, plan: StepPlan, step: StepResult) -> list[RequestOutput]:
        by_sequence = {g.sequence.id: (g, r) for g, r in zip(plan.grants, step.results, strict=True)}
        outputs: list[RequestOutput] = []
        for coordinator in self._requests_of(plan):
            mine = [by_sequence[s.id] for s in coordinator.sequences if s.id in by_sequence]
            mine = [(g, r) for g, r in mine if r.error is None or not coordinator.contain(g.sequence, r.error)]
            error = next((result.error for _, result in mine if result.error is not None), None)
            if error is None:
                for grant, _ in mine:
                    grant.sequence.commit(grant.stop)
                    self.kv.commit(grant.sequence.block_table, grant.token_ids, grant.stop)
                error = self._tell(coordinator, [SequenceResult(g.sequence, g.start, g.stop, r) for g, r in mine])
            if error is not None:
                outputs.append(self._end(coordinator, "error", error))
            elif coordinator.finished:
                outputs.append(self._end(coordinator, None))
            elif (output := coordinator.take_output(self.clock())) is not None:
                outputs.append(output)
        return outputs

    def _tell(self, coordinator: Coordinator, results: list[SequenceResult]) -> str | None:
        """Hand a request its results; the error, if its own bookkeeping fails on them."""
        try:
            coordinator.update(results)
        except Exception as error:
            log.exception("request %s failed on its results", coordinator.request_id)
            return f"{type(error).__name__}: {error}"
        return None

    def _end(self, coordinator: Coordinator, reason: str | None, error: str | None = None) -> RequestOutput:
        if reason is not None:
            coordinator.finish(reason, error)
        now = self.clock()
        coordinator.metrics.finished_time = now
        self.scheduler.remove(coordinator)
        del self._coordinators[coordinator.request_id]
        kind = EventKind.FINISHED if error is None else EventKind.FAILED
        self.events.emit(kind, coordinator.request_id, coordinator.end_reason, error or "")
        output = coordinator.take_output(now)
        if output is None:
            raise RuntimeError(f"request {coordinator.request_id} ended without an output")
        return output
