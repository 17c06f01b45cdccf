"""A user's session on the engine's side: a tree of branches, each a sequence, on which the user calls the verbs.

It is a request that lives until the user ends it. Between two calls nothing is pending: then the scheduler parks it,
and its blocks are the first that others get. What a branch is asked that takes steps (to generate, to select) is a
task. Its answer goes to a future; when it fails or is cancelled the branch is what it was before, and the session goes
on.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import Any

from octavo.coordinators.completion import Completion
from octavo.core.coordinator import Coordinator, NewSequence, SequenceResult
from octavo.core.errors import EngineClosedError, InvalidRequestError, OctavoError, RequestFailedError
from octavo.core.events import Reason
from octavo.core.grammar import GrammarState
from octavo.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from octavo.core.protocols import TextCodec
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.sequence import Sequence
from octavo.core.session_calls import ROOT, Call, Drop, Extend, Fork, Generate, Generated, Select, Truncate
from octavo.core.token_counts import TokenCounts
from octavo.core.want import NextLogprobs, Score, Wanted

log = logging.getLogger(__name__)


class BranchState:
    """A branch of a session. Only its coordinator changes it."""

    __slots__ = ("id", "last_call", "num_forks", "num_generated", "path", "sequence", "task", "undo")

    def __init__(self, branch_id: int, path: tuple[int, ...]) -> None:
        self.id = branch_id
        self.path = path  # numbers of the forks that lead here from the root
        self.num_forks = 0  # ever made
        self.num_generated = 0  # calls of generate
        self.sequence: Sequence | None = None  # None before the engine has started the session
        self.task: _Task | None = None
        self.undo: Callable[[], None] | None = None  # of the last verb
        self.last_call: int | None = None  # its number

    @property
    def token_ids(self) -> list[int]:
        """Its tokens; while it is at work, those from before."""
        token_ids = [] if self.sequence is None else list(self.sequence.token_ids)
        return token_ids if self.task is None else token_ids[: self.task.start]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class SessionCoordinator(Coordinator):
    """See the module. The verbs below are called between steps, like everything else here, and raise
    InvalidRequestError for a session or branch that has ended, or a branch that is at work."""

    def __init__(self, spec: SessionSpec, codec: TextCodec | None = None) -> None:
        super().__init__(spec.request_id, spec.priority, RequestMetrics(spec.arrival_time))
        self.seed = spec.seed
        self.codec = codec
        self.namespace = spec.namespace
        self.root = BranchState(ROOT, ())
        self._branches = {ROOT: self.root}  # by id
        self._branch_ids = count(ROOT + 1)
        self.error: str | None = None
        self._reason: str | None = None
        self._tasks: dict[int, _Task] = {}  # by id of the sequences that work for them
        self._failed: list[tuple[_Task, str]] = []

    @property
    def width(self) -> int:  # type: ignore[override]
        return sum(sequence.num_pending > 0 for sequence in self.sequences)

    def start(self, new_sequence: NewSequence) -> None:
        self.root.sequence = new_sequence(())
        self.sequences.append(self.root.sequence)

    # --- what is asked of it ---

    def call(self, call: Call) -> Any:
        """The answer to a call, or for what takes steps a future of it. Raises InvalidRequestError."""
        branch = self._branches.get(call.branch)
        if branch is None:
            if isinstance(call.verb, Drop):
                return None
            raise InvalidRequestError("branch", "was dropped")
        answer = self._call(branch, call)
        branch.last_call = call.number
        return answer

    def _call(self, branch: BranchState, call: Call) -> Any:
        match call.verb:
            case Extend(token_ids):
                return self.extend(branch, token_ids)
            case Truncate(num_tokens):
                return self.truncate(branch, num_tokens)
            case Fork(count):
                return [child.id for child in self.fork(branch, count)]
            case Generate(request):
                return self.generate(branch, request)
            case Select(choices):
                return self.select(branch, choices)
            case Drop():
                return self.drop_branch(branch)

    def take_back(self, call: Call) -> None:
        """Whoever asked this is gone and does not know how it went: the branch is put back to what it was before, if
        nothing was asked of it since. Draws and forks from here on are as if the call had never come."""
        branch = self._branches.get(call.branch)
        if branch is not None and branch.last_call == call.number and self._reason is None:
            undo, branch.undo = branch.undo, None
            if undo is not None:
                undo()

    # --- the verbs ---

    def extend(self, branch: BranchState, token_ids: SequenceOf[int]) -> None:
        """Append tokens; they are computed from the next step on, whether or not something is asked of them."""
        sequence = self._idle(branch)
        before = sequence.num_tokens
        branch.undo = lambda: sequence.truncate(before)
        if token_ids:
            sequence.extend(token_ids)

    def fork(self, branch: BranchState, count: int) -> list[BranchState]:
        """`count` new branches that share the blocks of this one."""
        sequence = self._idle(branch)
        children = []
        for _ in range(count):
            child = BranchState(next(self._branch_ids), (*branch.path, branch.num_forks))
            branch.num_forks += 1
            child.sequence = sequence.fork(sequence.num_tokens, child.path)
            self._branches[child.id] = child
            self.sequences.append(child.sequence)
            children.append(child)

        def undo() -> None:
            for child in children:
                self.drop_branch(child)
            branch.num_forks -= count

        branch.undo = undo
        return children

    def truncate(self, branch: BranchState, num_tokens: int) -> None:
        sequence = self._idle(branch)
        if not 0 <= num_tokens <= sequence.num_tokens:
            raise InvalidRequestError(
                "num_tokens", f"must be from 0 to {sequence.num_tokens}, what the branch has, not {num_tokens}"
            )
        gone = sequence.token_ids[num_tokens:]
        branch.undo = lambda: sequence.extend(gone) if gone else None
        sequence.truncate(num_tokens)

    def drop_branch(self, branch: BranchState) -> None:
        """End a branch and what it is at work on. Idempotent; its forks live on."""
        branch.undo = None
        if branch.sequence is None or branch.sequence.dropped:
            return
        if branch.task is not None:
            self._stop(branch.task, RequestFailedError("the branch was dropped while this ran"))
        self.drop(branch.sequence)
        self._branches.pop(branch.id, None)

    def generate(self, branch: BranchState, request: RequestSpec) -> Future[Generated]:
        """Continue a branch, whose tokens are the prompt.

        The draws' stream is the branch's path and a count of its generates: a function of what the user called on this
        branch, not of what else ran. The first generate of the root draws as a plain request with this seed. One that
        failed or was cancelled does not count.
        """
        sequence = self._idle(branch)
        request = replace(request, prompt_token_ids=tuple(sequence.token_ids))
        completion = Completion(request, 0, self.codec, stream=(*branch.path, branch.num_generated))
        return self._begin(_Generating(self, branch, sequence, completion)).future

    def select(self, branch: BranchState, choices: SequenceOf[SequenceOf[int]]) -> Future[list[list[float]]]:
        """Log-probability of each token of each choice, as continuations of the branch, which stays as it is."""
        sequence = self._idle(branch)
        return self._begin(_Selecting(self, branch, sequence, choices)).future

    def _idle(self, branch: BranchState) -> Sequence:
        """The sequence of a branch of which something can be asked."""
        if self._reason is not None:
            raise InvalidRequestError("session", f"has ended: {self.error}" if self.error else "is closed")
        if branch.sequence is None or branch.sequence.dropped:
            raise InvalidRequestError("branch", "was dropped")
        if branch.task is not None:
            raise InvalidRequestError("branch", "is at work on another call; fork it to do several things at once")
        return branch.sequence

    # --- tasks ---

    def _begin(self, task: _Task) -> _Task:
        self._tasks[task.sequence.id] = task
        task.branch.task = task

        def undo() -> None:
            if task.branch.task is task:
                self._stop(task, RequestFailedError("cancelled"))
            else:
                task.undo()

        task.branch.undo = undo
        try:
            task.begin()
        except BaseException as error:
            self._stop(task, RequestFailedError(f"{type(error).__name__}: {error}"))
            raise
        return task

    def work_for(self, task: _Task, sequence: Sequence) -> None:
        """One more sequence for a task, until it is dropped."""
        self._tasks[sequence.id] = task
        self.sequences.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        self._tasks.pop(sequence.id, None)
        super().drop(sequence)

    def _end_task(self, task: _Task) -> None:
        """The branch is as it is to be: from here on its tokens show."""
        self._tasks.pop(task.sequence.id, None)
        task.branch.task = None

    def _stop(self, task: _Task, error: Exception) -> None:
        """Whatever undoing raises, whoever waits hears of it."""
        task.branch.undo = None
        try:
            task.undo()
        finally:
            self._end_task(task)
            task.future.set_exception(error)

    def _update_task(self, task: _Task, result: SequenceResult) -> None:
        """One result of a task's. What its bookkeeping raises ends this task alone."""
        try:
            if not task.update(result):
                return
            answer = task.end()
        except OctavoError as error:  # says by itself what is wrong
            self._stop(task, error)
        except Exception as error:
            log.exception("a task of session %s failed on its results", self.request_id)
            self._stop(task, RequestFailedError(f"{type(error).__name__}: {error}"))
        except BaseException as error:  # a panic of Rust code
            self._stop(task, RequestFailedError(f"{type(error).__name__}: {error}"))
        else:
            self._end_task(task)
            task.future.set_result(answer)

    # --- a step ---

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        failed, self._failed = self._failed, []
        for task, error in failed:
            if not task.future.done():
                self._stop(task, RequestFailedError(error))
        for result in results:
            working = self._tasks.get(result.sequence.id)
            if working is not None:
                self._update_task(working, result)

    def contain(self, sequence: Sequence, error: str) -> bool:
        task = self._tasks.get(sequence.id)
        if task is not None:
            self._failed.append((task, error))
        else:  # computed ahead of being asked: whoever asks will try again, and hear of it
            sequence.truncate(sequence.num_tokens)
        return True

    # --- ending ---

    def begin_in_fork(self) -> None:
        """Branches are free again. Futures are left alone: threads of the parent may have had their locks."""
        for task in {id(task): task for task in self._tasks.values()}.values():
            task.undo()
            task.branch.undo = None
            self._end_task(task)

    def finish(self, reason: str, error: str | None = None) -> None:
        if self._reason is not None:
            return
        self._reason, self.error = reason, error
        for task in {id(task): task for task in self._tasks.values()}.values():
            task.branch.task = None
            ended = EngineClosedError("the session was closed while this ran")
            task.future.set_exception(ended if error is None else RequestFailedError(error))
        self._tasks.clear()

    @property
    def finished(self) -> bool:
        return self._reason is not None

    @property
    def end_reason(self) -> Reason:
        return Reason(self._reason or "")

    def take_output(self, now: float) -> RequestOutput | None:
        """Nothing while it runs: answers go to the futures."""
        if not self.finished:
            return None
        return RequestOutput(
            self.request_id,
            None,
            [],
            [],
            finished=True,
            seed=self.seed,
            error=self.error,
            metrics=replace(self.metrics),
        )


class _Task(ABC):
    """What a branch is at work on. `sequence` is the branch's."""

    def __init__(self, session: SessionCoordinator, branch: BranchState, sequence: Sequence) -> None:
        self.session = session
        self.branch = branch
        self.sequence = sequence
        self.start = sequence.num_tokens  # of the branch, when the task began
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # from here on only the session sets its outcome

    @abstractmethod
    def begin(self) -> None:
        """Call the first verb."""

    @abstractmethod
    def update(self, result: SequenceResult) -> bool:
        """Take the result of one of the task's sequences; whether it was the last."""

    @abstractmethod
    def end(self) -> Any:
        """Leave the branch as the user expects it; the answer."""

    @abstractmethod
    def undo(self) -> None:
        """Leave the branch as it was before."""


class _Generating(_Task):
    def __init__(
        self, session: SessionCoordinator, branch: BranchState, sequence: Sequence, completion: Completion
    ) -> None:
        super().__init__(session, branch, sequence)
        self.completion = completion

    def begin(self) -> None:
        self.branch.num_generated += 1
        self.sequence.extend((), want=self.completion.want)
        self.completion.attach_to(self.sequence)

    def update(self, result: SequenceResult) -> bool:
        self.session.metrics.num_generated_tokens += self.completion.append_draws(result.draws, self.sequence)
        return self.completion.finish_reason is not None

    def end(self) -> Generated:
        """The branch goes on with what the output's text shows."""
        output = self.completion.output()
        kept, drawn = self._kept(output), self.sequence.token_ids[self.start :]
        same = 0  # tokens whose KV is kept
        while same < min(len(kept), len(drawn)) and kept[same] == drawn[same]:
            same += 1
        self._leave(self.start + same)
        if kept[same:]:
            self.sequence.extend(kept[same:])
        return Generated(output, kept)

    def _kept(self, output: CompletionOutput) -> list[int]:
        request = self.completion.request
        if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
            return self._tokens_of(output.text, output.token_ids)
        if output.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            last = output.token_ids[-1:]
            return output.token_ids[: -1 if last and last[0] in request.end_token_ids else None]  # which is no text
        return output.token_ids

    def _tokens_of(self, text: str, token_ids: list[int]) -> list[int]:
        """A stop string may begin or end inside a token: the tokens up to there, and what is left of `text` anew."""
        request, codec = self.completion.request, self.completion.codec
        assert codec is not None
        stream = codec.text_stream(request.prompt_token_ids, skip_special_tokens=request.params.skip_special_tokens)
        count = length = 0
        for index, token_id in enumerate(token_ids, 1):
            stream.advance((token_id,))
            now = len(stream.text)
            if now > len(text):
                break
            if now > length:
                count, length = index, now
        kept, rest = token_ids[:count], text[length:]
        return kept + codec.encode_rest([*request.prompt_token_ids, *kept], rest) if rest else kept

    def undo(self) -> None:
        self.branch.num_generated -= 1
        self._leave(self.start)

    def _leave(self, num_tokens: int) -> None:
        attached = self.sequence.attached(TokenCounts), self.sequence.attached(GrammarState)
        for state in (*attached, self.completion.text_stream):
            if state is not None:
                self.sequence.detach(state)
        self.sequence.truncate(num_tokens)


class _Selecting(_Task):
    """The branch's last row says how probable each choice's first token is. All further tokens are computed in forks of
    the branch, one for each choice that has any, in one batch."""

    def __init__(
        self,
        session: SessionCoordinator,
        branch: BranchState,
        sequence: Sequence,
        choices: SequenceOf[SequenceOf[int]],
    ) -> None:
        super().__init__(session, branch, sequence)
        self.choices = choices
        self.logprobs = [[0.0] * len(choice) for choice in choices]
        self.forks: dict[int, tuple[int, Sequence]] = {}  # by sequence id: number of the choice, and its fork

    def begin(self) -> None:
        self.sequence.extend((), want=Score(tuple((choice[0],) for choice in self.choices)))

    def update(self, result: SequenceResult) -> bool:
        if result.sequence is self.sequence:
            if not result.rows:
                return False  # part of a branch that is computed again
            for logprobs, score in zip(self.logprobs, result.rows[0].scores, strict=True):
                logprobs[0] = score
            for index, choice in enumerate(self.choices):
                if len(choice) > 1:
                    self._fork(index, choice)
        else:
            self._take_further(result)
        return not self.forks

    def _fork(self, index: int, choice: SequenceOf[int]) -> None:
        """The last token's row is not needed, so the token is not appended: the row before scores it."""
        fork = self.sequence.fork(self.start, ())
        following = tuple(choice[1:-1])
        rows = (Wanted(self.start, self.start + len(following), NextLogprobs(following, 0)),) if following else ()
        fork.extend(choice[:-1], want=Score(((choice[-1],),)), rows=rows)
        self.forks[fork.id] = index, fork
        self.session.work_for(self, fork)

    def _take_further(self, result: SequenceResult) -> None:
        index, fork = self.forks[result.sequence.id]
        logprobs = self.logprobs[index]
        for row in result.rows:
            if row.logprobs is not None:
                logprobs[row.position + 1 - self.start] = row.logprobs.token.logprob  # of the token after it
            if row.scores:
                logprobs[-1] = row.scores[0]
                del self.forks[fork.id]
                self.session.drop(fork)

    def end(self) -> list[list[float]]:
        return self.logprobs

    def undo(self) -> None:
        for _, fork in self.forks.values():
            self.session.drop(fork)
        self.forks.clear()
        self.sequence.truncate(self.start)
