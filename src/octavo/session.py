"""Sessions for users: a tree of branches with the verbs extend, generate, select, fork, truncate and drop.

    with llm.session() as s:
        s.extend("Question: Is a whale a fish?\\nAnswer:")
        a, b = s.fork(2)
        a.generate(max_tokens=20)
        print(s.select([" Yes", " No"]).best.text)

A session is itself its first branch. What branches have in common is computed and stored once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Generic, TypeVar

from octavo.coordinators.session import BranchState, SessionCoordinator
from octavo.core.errors import EngineClosedError, InvalidRequestError, shown
from octavo.core.outputs import Choice, CompletionOutput, SelectResult
from octavo.core.params import MAX_N, SamplingParams, integer
from octavo.core.values import exact_bool, exact_list, exact_record, exact_str, is_a
from octavo.engine import Engine, EngineLoop
from octavo.frontend import Frontend, Prompt

Answer = TypeVar("Answer")
Verb = Callable[[], Answer]  # to be called between two steps of the engine


class Door:
    """The way from a session to its engine. Holds on to the LLM, which is not to be forgotten while a session lives."""

    def __init__(self, llm: object, loop: EngineLoop) -> None:
        self._llm = llm
        self._loop = loop

    def ask(self, coordinator: SessionCoordinator, verb: Verb[Answer]) -> Future[Answer]:
        """The answer of a verb, called between two steps of the engine. Raises EngineClosedError."""

        def question(engine: Engine) -> Answer:
            try:
                return verb()
            finally:
                engine.settle(coordinator)

        return self._loop.ask(question)

    def post(self, coordinator: SessionCoordinator, verb: Verb[object]) -> None:
        """The same for somebody who does not wait for it, or learn that the engine was closed; the verb must not
        raise."""

        def command(engine: Engine) -> None:
            verb()
            engine.settle(coordinator)

        with suppress(EngineClosedError):  # then it has ended already
            self._loop.post(command)

    def end_session(self, coordinator: SessionCoordinator) -> None:
        self._loop.abort([coordinator.request_id])

    def forget(self, coordinator: SessionCoordinator, branch: BranchState | None) -> None:
        """A branch, or with None a whole session, was garbage-collected. Called in any thread at any moment."""
        if branch is None:
            self.end_session(coordinator)
        else:
            self.post(coordinator, lambda: coordinator.drop_branch(branch))


class Call(Generic[Answer]):
    """A verb asked of a branch, which can be taken back when whoever asked it is gone."""

    def __init__(self, coordinator: SessionCoordinator, state: BranchState, verb: Verb[Answer]) -> None:
        self._coordinator = coordinator
        self._state = state
        self._verb = verb
        self._undo: Verb[None] | None = None  # while it was not carried out
        self.before = state.token_ids  # what the branch had when it was asked

    def __call__(self) -> Answer:
        """Carry it out: in the engine's thread, like the next."""
        answer = self._verb()
        self._undo = self._state.undo
        return answer

    def take_back(self) -> None:
        if self._undo is not None:
            self._coordinator.take_back(self._state, self._undo)


class Link:
    """What the branches of a session have in common. When all of them are gone so is this, and the session ends."""

    def __init__(self, door: Door, frontend: Frontend, coordinator: SessionCoordinator) -> None:
        self.door = door
        self.frontend = frontend
        self.coordinator = coordinator
        weakref.finalize(self, door.forget, coordinator, None).atexit = False


_branches: weakref.WeakSet[BaseBranch] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Whoever was using a branch is in the parent."""
    for branch in tuple(_branches):
        branch._in_use = threading.Lock()
        branch._undoing = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class BaseBranch:
    """What blocking and asynchronous branches share: their state, and the checks of what they are asked."""

    def __init__(self, link: Link, state: BranchState) -> None:
        self._link = link
        self._state = state
        self._in_use = threading.Lock()
        self._undoing: Future[None] | None = None  # what was asked for in vain last; done when it is taken back
        self._restored: list[int] = []  # the tokens that the branch then has
        _branches.add(self)
        weakref.finalize(self, link.door.forget, link.coordinator, state).atexit = False

    @property
    def token_ids(self) -> list[int]:
        """Its tokens; without those of a call that is under way, or is being taken back."""
        return list(self._restored) if self._is_being_restored else self._state.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self._restored) if self._is_being_restored else self._state.num_tokens

    @property
    def _is_being_restored(self) -> bool:
        undoing = self._undoing
        return undoing is not None and not undoing.done()

    @property
    def text(self) -> str:
        """Text of all tokens, special ones spelled out."""
        return self._link.frontend.text_of(self.token_ids)

    @property
    def seed(self) -> int:
        """The session's: given, or drawn when it began."""
        return self._link.coordinator.seed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A branch does one thing at a time."""
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError("branch", "is at work on another call; fork it to do several things at once")
        try:
            yield
        finally:
            self._in_use.release()

    def _extending(self, prompt: Prompt) -> Verb[None]:
        token_ids = self._link.frontend.tokens_after(prompt, self.token_ids)
        return lambda: self._link.coordinator.extend(self._state, token_ids)

    def _forking(self, count: int) -> Verb[list[BranchState]]:
        number = integer("n", count, 1, MAX_N)
        return lambda: self._link.coordinator.fork(self._state, number)

    def _truncating(self, num_tokens: int) -> Verb[None]:
        number = integer("num_tokens", num_tokens, 0, 2**31 - 1)
        return lambda: self._link.coordinator.truncate(self._state, number)

    def _generating(self, params: SamplingParams) -> Verb[Future[CompletionOutput]]:
        turn = self._link.frontend.make_turn(self._link.coordinator, params)
        return lambda: self._link.coordinator.generate(self._state, turn(self._state.token_ids))

    def _selecting(
        self, choices: Sequence[Prompt], by: str
    ) -> tuple[Verb[Future[list[list[float]]]], Callable[[list[list[float]]], SelectResult]]:
        """What to ask, and what to make of the answer."""
        by = exact_str("by", by, "must be 'mean' or 'total'")
        if by not in ("mean", "total"):
            raise InvalidRequestError("by", f"must be 'mean' or 'total', not {shown(by)}")
        found = self._link.frontend.choices(choices, self.token_ids)
        verb = lambda: self._link.coordinator.select(self._state, [token_ids for _, token_ids in found])  # noqa: E731

        def result(logprobs: list[list[float]]) -> SelectResult:
            scored = zip(found, logprobs, strict=True)
            return SelectResult([Choice(text, token_ids, row) for (text, token_ids), row in scored], by)

        return verb, result

    def _appending(self, choice: Choice) -> Verb[None]:
        return lambda: self._link.coordinator.extend(self._state, choice.token_ids)

    def _dropping(self) -> None:
        self._link.coordinator.drop_branch(self._state)

    def _call(self, verb: Verb[Answer]) -> Call[Answer]:
        return Call(self._link.coordinator, self._state, verb)

    def _taking_back(self, calls: Sequence[Call[Any]]) -> Future[None]:
        """Take back what was asked for in vain, one call or more. It comes after them: the engine's thread takes what
        it is asked in order. Raises EngineClosedError."""

        def undo() -> None:
            for call in calls:
                call.take_back()

        self._restored = calls[0].before
        self._undoing = self._link.door.ask(self._link.coordinator, undo)
        return self._undoing


def sampling(params: SamplingParams | None, fields: dict[str, Any], name: str = "sampling_params") -> SamplingParams:
    """Parameters given whole or field by field. Raises InvalidRequestError."""
    if params is not None and fields:
        raise InvalidRequestError(name, f"give SamplingParams or keywords, not both ({', '.join(fields)})")
    unknown = set(fields) - set(SamplingParams.__dataclass_fields__)
    if unknown:
        raise InvalidRequestError(min(unknown), "is not a field of SamplingParams")
    return SamplingParams(**fields) if params is None else exact_record(name, params, SamplingParams)


class Branch(BaseBranch):
    """One line of a session's text. Methods raise InvalidRequestError for wrong arguments, a dropped branch, a closed
    session, or a branch that another thread is using; EngineClosedError if the LLM was closed.
    """

    def extend(self, prompt: Prompt) -> None:
        """Append text, or tokens as ``{"prompt_token_ids": [...]}``. Special tokens such as BOS are put before the
        branch's first text only. What is appended is computed when somebody waits for an answer."""
        with self._alone():
            self._do(self._extending(prompt))

    def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        """Continue the branch, which then holds what the output's text shows: without the end token, and up to a stop
        string, unless `include_stop_str_in_output`.

        Draws are keyed by the seed (the session's, or that of the parameters), the path of forks to this branch, and
        the number of generates before this one: two of them differ, and all can be repeated.

        Args:
            sampling_params: or its fields as keywords. `n` and `prompt_logprobs` have no place here.

        Raises RequestFailedError if the engine could not; the branch is then what it was before.
        """
        return _generate([self], [sampling(sampling_params, fields)])[0]

    def select(self, choices: Sequence[Prompt], *, by: str = "mean", extend: bool = False) -> SelectResult:
        """Which of some texts would best go on here: the log-probability of each, all computed in one batch over the
        branch's shared KV.

        Args:
            choices: texts, or ``{"prompt_token_ids": [...]}``; each is tokenised as if it were appended.
            by: what `best` goes by, the log-probability per token ("mean") or that of the text ("total").
            extend: append the best one; else the branch stays as it is.
        """
        extend = exact_bool("extend", extend)
        with self._alone():
            verb, result = self._selecting(choices, by)
            selected = result(_answers([(self, verb)])[0])
            if extend:
                self._do(self._appending(selected.best))
            return selected

    def fork(self, n: int = 1) -> list[Branch]:
        """`n` new branches that begin as this one; they share its KV."""
        with self._alone():
            return [Branch(self._link, state) for state in self._do(self._forking(n))]

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        with self._alone():
            self._do(self._truncating(num_tokens))

    def drop(self) -> None:
        """End the branch, and what another thread is doing on it; its forks live on. Idempotent."""
        self._do(self._dropping)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._undoing is not None:  # a second interrupt came while the first one's call was taken back
            wait([self._undoing])
        with super()._alone():
            yield

    def _do(self, verb: Verb[Answer]) -> Answer:
        call = self._call(verb)
        try:
            return self._link.door.ask(self._link.coordinator, call).result()
        except BaseException:  # an interrupt, perhaps, after the verb was carried out
            self._take_back([call], [self])
            raise

    def _take_back(self, calls: Sequence[Call[Any]], branches: Sequence[Branch]) -> None:
        """`branches`: whose calls they are, one each."""
        with suppress(EngineClosedError):
            undoing = self._taking_back(calls)
            for branch, call in zip(branches, calls, strict=True):
                branch._restored, branch._undoing = call.before, undoing
            undoing.result()


class Session(Branch):
    """Made by `LLM.session`. It is its own first branch. Closing it, or forgetting it and all its branches, frees its
    blocks."""

    def __init__(self, door: Door, frontend: Frontend, coordinator: SessionCoordinator) -> None:
        super().__init__(Link(door, frontend, coordinator), coordinator.root)

    def generate_all(
        self,
        branches: Sequence[Branch],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Any,
    ) -> list[CompletionOutput]:
        """Continue several branches of this session in one batch; see `Branch.generate`.

        Args:
            branches: different ones.
            sampling_params: one for all branches, or one each; or its fields as keywords, for all.

        Raises the first error, after all have ended.
        """
        branches = exact_list("branches", branches, "must be a list of branches")
        if not all(is_a(branch, Branch) for branch in branches):
            raise InvalidRequestError("branches", "must be a list of branches")
        if any(branch._link is not self._link for branch in branches):
            raise InvalidRequestError("branches", "one of them is of another session")
        if len({id(branch._state) for branch in branches}) < len(branches):
            raise InvalidRequestError("branches", "one of them stands there twice")
        given: Any = sampling_params
        listed = is_a(given, Sequence)
        if listed:
            given = exact_list("sampling_params", given)
            if len(given) != len(branches):
                got = f"{len(given)} of them for {len(branches)} branches"
                raise InvalidRequestError("sampling_params", f"must be one for all, or one for each, not {got}")
            each = [sampling(one, fields, f"sampling_params[{number}]") for number, one in enumerate(given)]
        else:
            each = [sampling(given, fields)] * len(branches)
        return _generate(branches, each, listed=listed)

    def close(self) -> None:
        """End all branches, and what other threads are doing on them. Idempotent."""
        self._link.door.end_session(self._link.coordinator)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _generate(
    branches: Sequence[Branch], params: Sequence[SamplingParams], *, listed: bool = False
) -> list[CompletionOutput]:
    """All in one batch: none runs before every one was checked."""
    if not branches:
        return []
    link = branches[0]._link
    with ExitStack() as stack:
        asked = []
        for number, (branch, one) in enumerate(zip(branches, params, strict=True)):
            with _naming_branch(number, len(branches), listed):
                stack.enter_context(branch._alone())
                asked.append((branch, branch._generating(one)))
        outputs = _answers(asked)
        return [link.frontend.name_completion(output) for output in outputs]


@contextmanager
def _naming_branch(number: int, count: int, listed: bool = False) -> Iterator[None]:
    """Of several branches the one at fault is named, and of parameters in a list those that are."""
    try:
        yield
    except InvalidRequestError as error:
        if count > 1 and error.field == "branch":
            raise InvalidRequestError(f"branches[{number}]", error.problem) from None
        if listed and error.field == "sampling_params":
            raise InvalidRequestError(f"sampling_params[{number}]", error.problem) from None
        if listed and error.field in SamplingParams.__dataclass_fields__:
            raise InvalidRequestError(f"sampling_params[{number}].{error.field}", error.problem) from None
        raise


def _answers(asked: Sequence[tuple[Branch, Verb[Future[Answer]]]]) -> list[Answer]:
    """Begin tasks of one session's branches, all before the next step, and wait for them. If one is refused, or the
    caller is interrupted, all branches are put back to what they were."""
    first = asked[0][0]
    calls = [branch._call(verb) for branch, verb in asked]

    def begin() -> list[Future[Answer]]:
        begun = []
        for number, call in enumerate(calls):
            with _naming_branch(number, len(calls)):
                begun.append(call())
        return begun

    try:
        futures = first._link.door.ask(first._link.coordinator, begin).result()
        wait(futures)
    except BaseException:
        first._take_back(calls, [branch for branch, _ in asked])
        raise
    return [future.result() for future in futures]
