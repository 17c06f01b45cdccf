"""The engine: requests in, outputs out, one step at a time.

`step` is three calls: `scheduler.schedule() -> executor.execute(plan) -> update(results)`. Errors belong to one
request: it ends with a reason, its blocks go home, the engine goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from octavo.coordinators.factory import make_coordinator
from octavo.core.coordinator import Coordinator, SequenceResult
from octavo.core.errors import InvalidRequestError, OctavoError
from octavo.core.events import EventKind, EventRing, Reason
from octavo.core.namespace import Namespace
from octavo.core.outputs import CacheExplanation, CompletionOutput, RequestOutput
from octavo.core.plan import Grant, GrantResult, StepPlan, StepResult, accepted_drafts
from octavo.core.proposer import Proposer
from octavo.core.protocols import Background, Clock, Executor, TextCodec
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.sequence import Sequence
from octavo.engine.scheduler import Scheduler, SchedulerConfig
from octavo.kv_cache import KVCacheManager
from octavo.kv_cache.eviction_log import Evicted

if TYPE_CHECKING:
    from octavo.core.margins import MarginsSpec
    from octavo.core.pooling import PoolingSpec
    from octavo.core.session_calls import Call

log = logging.getLogger(__name__)

StepListener = Callable[[StepPlan, StepResult], None]
Output = Any  # RequestOutput, MarginsOutput or PoolingOutput

_WAIT_FOR_LOADS = 0.02  # seconds that a step waits when nothing else can be done: commands wait as long


class _AtOnce:
    """A Background for those who step an engine themselves."""

    def submit(self, request_id: str, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        try:
            answer = job()
        except Exception as error:
            answer = error
        done(answer)


class Engine:
    """Single-threaded: `add`, `abort` and `step` are called by one thread at a time.

    `plan_listeners` are called with each plan before it is carried out, and `step_listeners` with it, as far as it was
    carried out, and its results, before requests get them. One that raises is called no more. `background` is set
    before the first request comes.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        executor: Executor,
        clock: Clock,
        codec: TextCodec | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        self.clock = clock
        self.kv = kv
        self.events = EventRing(clock)
        self.plan_listeners: list[Callable[[StepPlan], None]] = []
        self.step_listeners: list[StepListener] = []
        self.background: Background = _AtOnce()
        self.proposer = proposer
        self.scheduler = Scheduler(config, kv, self.events, proposer)
        kv.on_evict = self._note_eviction
        self._executor = executor
        self._codec = codec
        self._sequence_ids = count()
        self._coordinators: dict[str, Coordinator] = {}
        self._outputs: list[Output] = []  # of what happened outside steps
        self.num_steps = 0

    def add_request(self, spec: RequestSpec | SessionSpec | MarginsSpec | PoolingSpec) -> None:
        """Queue a request; see `add`."""
        self.add(make_coordinator(spec, self._codec, self.background))

    def add(self, coordinator: Coordinator) -> None:
        """Queue a request, made already. Raises InvalidRequestError if its id is in use or it could never run to its
        end, and what its `start` raises; then nothing of it is left."""
        if coordinator.request_id in self._coordinators:
            raise InvalidRequestError("request_id", f"{coordinator.request_id!r} is in use")
        self.scheduler.add(coordinator)
        try:
            coordinator.start(partial(self._new_sequence, coordinator))
            self.scheduler.settle(coordinator)
        except BaseException:
            self.scheduler.remove(coordinator)
            raise
        self._coordinators[coordinator.request_id] = coordinator
        self.events.emit(EventKind.QUEUED, coordinator.request_id)

    def _new_sequence(self, coordinator: Coordinator, stream: tuple[int, ...]) -> Sequence:
        table = self.kv.new_table(coordinator.request_id, coordinator.namespace, private=not coordinator.reads_cache)
        return Sequence(next(self._sequence_ids), self.kv, self._sequence_ids.__next__, stream, table)

    def _note_eviction(self, evicted: Evicted) -> None:
        detail = f"block {evicted.depth} of its prefix, cached for {evicted.age:.3f} s"
        self.events.emit(EventKind.CACHE_EVICTED, evicted.request_id, Reason(evicted.reason), detail)

    def call(self, request_id: str, calls: SequenceOf[Any]) -> list[Any]:
        """Ask a request under way, such as a session's branches, several things, all before the next step. Returns the
        answers, or for what takes steps futures of them; one that is refused is its InvalidRequestError, and those
        after it are left out. Without any answer the request has ended."""
        coordinator = self._coordinators.get(request_id)
        if coordinator is None:
            return []
        answers: list[Any] = []
        try:
            for call in calls:
                answers.append(coordinator.call(call))
        except InvalidRequestError as error:
            answers.append(error)
        finally:
            self.scheduler.settle(coordinator)
        self.resume(request_id, coordinator.go_on)
        return answers

    def resume(self, request_id: str, act: Callable[[], None]) -> None:
        """Something that a request waited for is there: let it `act` on it. What that raises ends the request; what is
        new for its user comes with `take_outputs`."""
        coordinator = self._coordinators.get(request_id)
        if coordinator is None:
            return
        output = self._advance_by(coordinator, act)
        if output is not None:
            self._outputs.append(output)
        if request_id in self._coordinators:
            self.scheduler.settle(coordinator)

    def take_outputs(self) -> list[Output]:
        """What is new for users since the last step or call of this."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_back(self, request_id: str, calls: SequenceOf[Call]) -> None:
        """Whoever asked this is gone: the branches are put back to what they were."""
        session = self._coordinators.get(request_id)
        if session is not None:
            try:
                for call in calls:
                    session.take_back(call)
            finally:
                self.scheduler.settle(session)

    def abort(self, request_id: str) -> Output | None:
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
        return self.kv.explain(token_ids, Namespace(salt))

    def cache_order(
        self, prefix: SequenceOf[int], parts: SequenceOf[SequenceOf[int]], salt: str | None = None
    ) -> list[int]:
        """Numbers of all parts, in the order in which most of a prompt of the prefix and them is cached now."""
        return self.kv.order(prefix, parts, Namespace(salt))

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a request waits for steps. One that nothing is asked of (a session between two calls) does not."""
        return bool(self.scheduler.num_waiting or self.scheduler.num_running)

    def begin_in_fork(self) -> None:
        """In a forked child: nobody reads blocks for it, and who waits for a session's answers is in the parent."""
        self.kv.forget_loads()
        for coordinator in tuple(self._coordinators.values()):
            coordinator.begin_in_fork()
            self.scheduler.settle(coordinator)

    @property
    def num_requests(self) -> int:
        return len(self._coordinators)

    def figures(self) -> dict[str, Any]:
        """What it does now, for whoever watches, from any thread."""
        return {
            "steps": self.num_steps,
            "requests": self.num_requests,
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting,
            "blocks": self.kv.num_blocks,
            "available_blocks": self.kv.num_available,
            "cached_blocks": self.kv.num_cached,
            "stats": replace(self.kv.stats),
            "speculation": None if self.proposer is None else self.proposer.stats.copy(),
        }

    def step(self) -> list[Output]:
        """Run one step; what is new for users, in the order in which the requests were added. While all that is left
        waits for blocks that are being read, it waits for them a little and does nothing."""
        began = self.clock()
        plan = self.scheduler.schedule()
        outputs = self.take_outputs()
        outputs += [self._end(coordinator, "error", error) for coordinator, error in self.scheduler.broken]
        if not plan:
            if self.scheduler.waits_for_loads:
                self.kv.wait_for_loads(_WAIT_FOR_LOADS)
            elif not outputs:
                outputs = self._end_stalled()
            return outputs
        self.num_steps += 1
        now = self.clock()
        requests = self._requests_of(plan)
        for coordinator in requests:
            if coordinator.metrics.first_scheduled_time is None:
                coordinator.metrics.first_scheduled_time = now
        _tell(self.plan_listeners, plan)
        planned = plan
        plan, result = self._execute(plan)
        if plan is not planned:
            requests = self._requests_of(plan)
        self.kv.stats.computed_tokens += plan.num_tokens
        self._learn_speed(plan, result)
        _tell(self.step_listeners, plan, result)
        outputs += self._update(requests, plan, result)
        self._learn_of_guesses(plan, result, self.clock() - began)
        return outputs

    def _learn_of_guesses(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        if self.proposer is not None:
            try:
                self.proposer.learn(plan, result, seconds)
            except Exception:
                log.exception("learning what came of guesses raised")

    def _learn_speed(self, plan: StepPlan, result: StepResult) -> None:
        """How long a block of a prompt takes to compute: what a cached one has to be faster than."""
        seconds = result.timings.get("model")
        if seconds is not None and plan.num_tokens >= self.kv.block_size * max(len(plan.grants), 1):
            self.kv.learn_speed(seconds / plan.num_tokens)

    def _end_stalled(self) -> list[Output]:
        """Nothing can run, though somebody wants to: the one that does not fit ends with an error, better than waiting
        for ever; the others go on."""
        coordinator = self.scheduler.stalled()
        if coordinator is None:
            return []
        tokens = sum(sequence.num_tokens for sequence in coordinator.sequences)
        needs = f"{len(coordinator.sequences)} sequences of {tokens} tokens in all do not fit"
        has = f"{self.kv.num_blocks} blocks of {self.kv.block_size} tokens, {self.scheduler.config}"
        return [self._end(coordinator, "error", f"the request cannot go on: {needs} ({has})")]

    def end_all(self, error: str) -> list[Output]:
        """End all requests with an error: after a failure that is nobody's. The engine goes on."""
        return [self._end(coordinator, "error", error) for coordinator in tuple(self._coordinators.values())]

    def close(self) -> list[Output]:
        """End all requests and the executor. What is cached stays in the tier, if there is one."""
        outputs = [self.abort(request_id) for request_id in tuple(self._coordinators)]
        try:
            self.kv.close()
        finally:
            self._executor.close()
        return [output for output in outputs if output is not None]

    # --- executing ---

    def _execute(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        """The results, and the plan as far as it was carried out."""
        blocks = {load.block for load in plan.loads}
        try:
            result = self._executor.execute(plan).result()
        except Exception as error:
            # Nothing is committed. Whose fault it was shows when each part runs by itself.
            log.warning("step %d raised (%r); retrying its %d rows one by one", plan.step, error, len(plan.grants))
            self.events.emit(EventKind.STEP_RETRIED, reason=Reason.STEP_RAISED, detail=repr(error))
            lost = self._move_singly(plan)
            plan = replace(plan, grants=self._evict_lost(plan.grants, lost))
            result = self._execute_singly(plan)
            blocks -= lost
        self.kv.settle_loads(blocks)
        return self._retry_without_drafts(plan, result)

    def _retry_without_drafts(self, plan: StepPlan, step: StepResult) -> tuple[StepPlan, StepResult]:
        """A guess that cannot be computed is no fault of the request for which it was made."""
        grants, results = list(plan.grants), list(step.results)
        failed = [i for i, result in enumerate(results) if result.error is not None and grants[i].num_drafts]
        for i in failed:
            grants[i] = grants[i].without_drafts()
            (results[i],) = self._execute_singly(replace(plan, grants=(grants[i],))).results
        if not failed:
            return plan, step
        return replace(plan, grants=tuple(grants)), replace(step, results=tuple(results))

    def _move_singly(self, plan: StepPlan) -> set[int]:
        """Copy and load block by block; those that could not be written."""
        lost: set[int] = set()
        for part in (
            *(replace(plan, grants=(), copies=(copy,), loads=()) for copy in plan.copies),
            *(replace(plan, grants=(), copies=(), loads=(load,)) for load in plan.loads),
        ):
            target = part.copies[0].target if part.copies else part.loads[0].block
            try:
                if part.copies and part.copies[0].source in lost:
                    raise RuntimeError("what was to be copied is lost")
                self._executor.execute(part).result()
                lost.discard(target)
            except Exception:
                log.exception("block %d could not be written in step %d", target, plan.step)
                lost.add(target)
        return lost

    def _evict_lost(self, grants: tuple[Grant, ...], lost: set[int]) -> tuple[Grant, ...]:
        """Sequences whose tables name lost blocks are computed anew, whether or not they were to run. What is left of
        the grants."""
        withheld: set[int] = set()
        for coordinator in self._coordinators.values() if lost else ():
            broken = [one for one in coordinator.sequences if not lost.isdisjoint(one.block_table)]
            if broken and not coordinator.metrics.num_generated_tokens:
                coordinator.metrics.num_cached_tokens = 0  # counted when it is found again
            for sequence in broken:
                sequence.evict()
                detail = f"sequence {sequence.id}"
                self.events.emit(EventKind.EVICTED, coordinator.request_id, Reason.STEP_RAISED, detail)
            # In lockstep the rows of the others wait for those that are computed anew.
            withheld.update(one.id for one in (coordinator.sequences if broken and coordinator.lockstep else broken))
        return tuple(grant for grant in grants if grant.sequence_id not in withheld)

    def _execute_singly(self, plan: StepPlan) -> StepResult:
        results: list[GrantResult] = []
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

    def _update(self, requests: SequenceOf[Coordinator], plan: StepPlan, step: StepResult) -> list[Output]:
        by_sequence = {g.sequence_id: (g, r) for g, r in zip(plan.grants, step.results, strict=True)}
        outputs = [self._advance(coordinator, by_sequence) for coordinator in requests]
        return [output for output in outputs if output is not None]

    def _advance(self, coordinator: Coordinator, by_sequence: dict[int, tuple[Grant, GrantResult]]) -> Output | None:
        """Commit what a request got in this step and hand it over; what is new for the user."""

        def hand_over() -> str | None:
            granted = [(s, *by_sequence[s.id]) for s in coordinator.sequences if s.id in by_sequence]
            granted = [(s, g, r) for s, g, r in granted if r.error is None or not coordinator.contain(s, r.error)]
            error = next((result.error for _, _, result in granted if result.error is not None), None)
            if error is None:
                coordinator.update([self._commit(sequence, grant, result) for sequence, grant, result in granted])
            return error

        return self._advance_by(coordinator, hand_over)

    def _advance_by(self, coordinator: Coordinator, act: Callable[[], str | None]) -> Output | None:
        """What is new for a request's user after `act`, which returns an error if the request is to end with it.
        Whatever its own bookkeeping raises ends this request alone."""
        try:
            error = act()
            if error is not None:
                return self._end(coordinator, "error", error)
            return self._end(coordinator, None) if coordinator.finished else coordinator.take_output(self.clock())
        except (KeyboardInterrupt, SystemExit):
            raise
        except OctavoError as error:  # says by itself what is wrong
            return self._end(coordinator, "error", str(error))
        except BaseException as error:  # a panic of Rust code is no Exception
            log.exception("request %s failed on its results", coordinator.request_id)
            return self._end(coordinator, "error", f"{type(error).__name__}: {error}")

    def _commit(self, sequence: Sequence, grant: Grant, result: GrantResult) -> SequenceResult:
        """What was computed counts, up to the first draft that differs from what was drawn."""
        stop, token_ids, rows = grant.stop, sequence.token_ids, result.rows
        if grant.num_drafts or grant.num_lookahead:
            accepted, first = accepted_drafts(grant, rows), grant.first_draft
            self._count_drafts(grant, len(accepted))
            stop = first + len(accepted)
            token_ids = [*token_ids, *(grant.drafts[n] for n in accepted)]
            of_drafts = rows[len(rows) - grant.num_drafts :]
            rows = rows[: len(rows) - grant.num_drafts]
            rows += tuple(of_drafts[n]._replace(position=first + i) for i, n in enumerate(accepted))
            self.kv.truncate(sequence.block_table, stop)
        sequence.commit(stop)
        exact = stop if sequence.exact_until is None else min(stop, sequence.exact_until)
        self.kv.commit(sequence.block_table, token_ids, exact)
        return SequenceResult(sequence, grant.start, stop, rows)

    def _count_drafts(self, grant: Grant, accepted: int) -> None:
        metrics = self._coordinators[grant.request_id].metrics
        metrics.num_draft_tokens += grant.num_drafts
        metrics.num_accepted_tokens += accepted

    def _end(self, coordinator: Coordinator, reason: str | None, error: str | None = None) -> Output:
        """Its last output. The request is gone from the engine whatever its own bookkeeping raises."""
        request_id = coordinator.request_id
        now = self.clock()
        coordinator.metrics.finished_time = now
        output: Output | None = None
        ended = Reason.ERROR
        try:
            if reason is not None:
                coordinator.finish(reason, error)
            ended = coordinator.end_reason
            output = coordinator.take_output(now)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:
            log.exception("request %s failed at its end", request_id)
            error = error or f"{type(failure).__name__}: {failure}"
            ended = Reason.ERROR
        finally:
            if self._coordinators.pop(request_id, None) is not None:
                self.scheduler.remove(coordinator)
        if output is None:
            error = error or "the request ended without an output"
            failed = CompletionOutput(0, "", [], finish_reason="error")
            output = RequestOutput(request_id, None, [], [failed], finished=True, error=error)
        kind = EventKind.FAILED if ended is Reason.ERROR else EventKind.FINISHED
        self.events.emit(kind, request_id, ended, output.error or "")
        return output


def _tell(listeners: list[Any], *what: Any) -> None:
    for listener in tuple(listeners):
        try:
            listener(*what)
        except Exception:
            log.exception("a listener of steps raised, and is called no more")
            listeners.remove(listener)
