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
from itertools import count
from typing import TYPE_CHECKING, Any

from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError, shown
from octavo.core.outputs import Choice, CompletionOutput, RequestOutput, SelectResult
from octavo.core.params import MAX_N, SamplingParams, integer
from octavo.core.request import SessionSpec
from octavo.core.session_calls import ROOT, Call, Drop, Extend, Fork, Generate, Select, Truncate, Verb
from octavo.core.values import exact_bool, exact_list, exact_record, exact_str, is_a
from octavo.frontend import Frontend, Prompt

if TYPE_CHECKING:
    from octavo.core.engine_client import EngineClient


class _Ending:
    """How a session ended, once it has. Apart from the session, which the engine's thread is not to hold on to."""

    def __init__(self) -> None:
        self.problem = "is closed"
        self.is_over = False

    def note(self, last: RequestOutput | Exception) -> None:
        self.is_over = True
        error = str(last) if isinstance(last, Exception) else last.error
        if error is not None:
            self.problem = f"has ended: {error}"


class SessionClient:
    """A session as its branches know it: the way to its engine, and what they have in common. When all branches are
    gone so is this, and the session ends. Holds on to the LLM, which is not to be forgotten while a session lives."""

    def __init__(self, llm: object, loop: EngineClient, frontend: Frontend, spec: SessionSpec) -> None:
        self.loop = loop
        self.frontend = frontend
        self.spec = spec
        self._llm = llm
        self._numbers = count()
        self._ending = _Ending()
        loop.add_session(spec, self._ending.note)
        weakref.finalize(self, loop.abort, [spec.request_id]).atexit = False

    @property
    def ended(self) -> str | None:
        """How it has ended, such as with its engine's process; None while it lives, as far as is known here."""
        return self._ending.problem if self._ending.is_over else None

    def call(self, branch: int, verb: Verb) -> Call:
        return Call(next(self._numbers), branch, verb)

    def ask(self, calls: Sequence[Call]) -> Future[list[Any]]:
        """Answers to calls, all made between the same two steps; see `Engine.call`. Raises EngineClosedError."""
        return self.loop.call(self.spec.request_id, calls)

    def check(self, answers: list[Any]) -> None:
        """Raises InvalidRequestError for a session that has ended."""
        if not answers:
            raise InvalidRequestError("session", self._ending.problem)

    def take_back(self, calls: Sequence[Call]) -> Future[None]:
        """Put the branches back to what they were before these calls. It comes after them: the engine's thread takes
        what it is asked in order. Raises EngineClosedError."""
        return self.loop.take_back(self.spec.request_id, calls)

    def close(self) -> None:
        self.loop.abort([self.spec.request_id])


_branches: weakref.WeakSet[BaseBranch] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Whoever was using a branch is in the parent: what he asked is to be taken back."""
    for branch in tuple(_branches):
        branch._in_use = threading.Lock()
        branch._undoing = None
        branch._abandoned, branch._calls = [*branch._abandoned, *branch._calls], []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class BaseBranch:
    """What blocking and asynchronous branches share: their tokens, and the checks of what they are asked.

    The tokens are those that callers have heard of. What a call does to the engine's branch shows here when the call
    returns; one whose caller went away is taken back there, and never shows.
    """

    def __init__(self, client: SessionClient, branch: int = ROOT, token_ids: Sequence[int] = ()) -> None:
        self._client = client
        self._branch = branch
        self._token_ids = list(token_ids)  # replaced, not changed
        self._in_use = threading.Lock()
        self._calls: list[Call] = []  # of whoever uses it
        self._abandoned: list[Call] = []  # of those who are in the parent of this process
        self._undoing: Future[None] | None = None  # what was asked for in vain last; done when it is taken back
        _branches.add(self)
        call = client.call(branch, Drop())
        weakref.finalize(self, client.loop.forget, client.spec.request_id, call).atexit = False

    @property
    def number(self) -> int:
        """Which branch of its session: 0 is what it began with."""
        return self._branch

    @property
    def token_ids(self) -> list[int]:
        """Its tokens; without those of a call that is under way."""
        return list(self._token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def text(self) -> str:
        """Text of all tokens, special ones spelled out."""
        return self._client.frontend.text_of(self._token_ids)

    @property
    def seed(self) -> int:
        """The session's: given, or drawn when it began."""
        return self._client.spec.seed

    @contextmanager
    def _alone(self) -> Iterator[list[Call]]:
        """A branch does one thing at a time. Gives the list that its calls go into."""
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError("branch", "is at work on another call; fork it to do several things at once")
        self._calls = []
        try:
            if self._abandoned:
                abandoned, self._abandoned = self._abandoned, []
                self._client.take_back(abandoned)
            yield self._calls
        finally:
            self._calls = []
            self._in_use.release()

    # --- what to ask ---

    def _extending(self, prompt: Prompt) -> Extend:
        return Extend(tuple(self._client.frontend.tokens_after(prompt, self._token_ids)))

    def _forking(self, n: int) -> Fork:
        return Fork(integer("n", n, 1, MAX_N))

    def _truncating(self, num_tokens: int) -> Truncate:
        return Truncate(integer("num_tokens", num_tokens, 0, 2**31 - 1))

    def _generating(self, params: SamplingParams) -> Generate:
        return Generate(self._client.frontend.make_turn(self._client.spec, params, self.num_tokens))

    def _selecting(
        self, choices: Sequence[Prompt], by: str
    ) -> tuple[Select, Callable[[list[list[float]]], SelectResult]]:
        """What to ask, and what to make of the answer."""
        by = exact_str("by", by, "must be 'mean' or 'total'")
        if by not in ("mean", "total"):
            raise InvalidRequestError("by", f"must be 'mean' or 'total', not {shown(by)}")
        found = self._client.frontend.choices(choices, self._token_ids)

        def result(logprobs: list[list[float]]) -> SelectResult:
            scored = zip(found, logprobs, strict=True)
            return SelectResult([Choice(text, token_ids, row) for (text, token_ids), row in scored], by)

        return Select(tuple(tuple(token_ids) for _, token_ids in found)), result

    def _call(self, verb: Verb, calls: list[Call]) -> Call:
        call = self._client.call(self._branch, verb)
        calls.append(call)
        return call

    def _answer(self, answers: list[Any]) -> Any:
        """To a single call. Raises InvalidRequestError if it was refused."""
        self._client.check(answers)
        if isinstance(answers[0], InvalidRequestError):
            raise answers[0]
        return answers[0]

    # --- what the answers say of the tokens ---

    def _extended(self, token_ids: Sequence[int]) -> None:
        self._token_ids = [*self._token_ids, *token_ids]

    def _truncated(self, num_tokens: int) -> None:
        self._token_ids = self._token_ids[:num_tokens]


def sampling(params: SamplingParams | None, fields: dict[str, Any], name: str = "sampling_params") -> SamplingParams:
    """Parameters given whole or field by field. Raises InvalidRequestError."""
    if params is not None and fields:
        raise InvalidRequestError(name, f"give SamplingParams or keywords, not both ({', '.join(fields)})")
    fields = dict(fields)
    for kind in ("json", "regex", "choice", "grammar"):  # short for structured_outputs
        if kind in fields:
            if fields.get("structured_outputs") is not None:
                raise InvalidRequestError(kind, "and structured_outputs are both given")
            fields["structured_outputs"] = {kind: fields.pop(kind)}
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
        with self._alone() as calls, self._restoring():
            verb = self._extending(prompt)
            self._do(verb, calls)
            self._extended(verb.token_ids)

    def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        """Continue the branch, which then holds what the output's text shows: without the end token, and up to a stop
        string, unless `include_stop_str_in_output`.

        Draws are keyed by the seed (the session's, or that of the parameters), the path of forks to this branch, and
        the number of generates before this one: two of them differ, and all can be repeated.

        Args:
            sampling_params: or its fields as keywords. `n` and `prompt_logprobs` have no place here. `json`, `regex`,
                `choice` and `grammar` are short for structured_outputs.

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
        with self._alone() as calls, self._restoring():
            verb, result = self._selecting(choices, by)
            selected = result(self._do(verb, calls).result())
            if extend:
                token_ids = selected.best.token_ids
                self._do(Extend(tuple(token_ids)), calls)
                self._extended(token_ids)
            return selected

    def fork(self, n: int = 1) -> list[Branch]:
        """`n` new branches that begin as this one; they share its KV."""
        with self._alone() as calls, self._restoring():
            return [Branch(self._client, branch, self._token_ids) for branch in self._do(self._forking(n), calls)]

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        with self._alone() as calls, self._restoring():
            verb = self._truncating(num_tokens)
            self._do(verb, calls)
            self._truncated(verb.num_tokens)

    def drop(self) -> None:
        """End the branch, and what another thread is doing on it; its forks live on. Idempotent."""
        self._client.ask([self._client.call(self._branch, Drop())]).result()

    @contextmanager
    def _alone(self) -> Iterator[list[Call]]:
        if self._undoing is not None:  # a second interrupt came while the first one's call was taken back
            wait([self._undoing])
        with super()._alone() as calls:
            yield calls

    def _do(self, verb: Verb, calls: list[Call]) -> Any:
        return self._answer(self._client.ask([self._call(verb, calls)]).result())

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """If the block is left by an interrupt, its calls, which may have been carried out, are taken back."""
        with _restoring([self]):
            yield


@contextmanager
def _restoring(branches: Sequence[Branch]) -> Iterator[None]:
    """Whatever ends the block early, the branches are what they were. One whose call failed or was refused is so
    already."""
    before = [branch._token_ids for branch in branches]
    try:
        yield
    except (InvalidRequestError, RequestFailedError):
        raise
    except BaseException:
        for branch, token_ids in zip(branches, before, strict=True):
            branch._token_ids = token_ids
        _take_back(branches)
        raise


def _take_back(branches: Sequence[Branch]) -> None:
    """Put them back to what they were before the calls of those who use them."""
    calls = [call for branch in branches for call in branch._calls]
    if calls:
        with suppress(EngineClosedError):
            undoing = branches[0]._client.take_back(calls)
            for branch in branches:
                branch._undoing = undoing
            undoing.result()


class Session(Branch):
    """Made by `LLM.session`. It is its own first branch. Closing it, or forgetting it and all its branches, frees its
    blocks."""

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
        if any(branch._client is not self._client for branch in branches):
            raise InvalidRequestError("branches", "one of them is of another session")
        if len({branch._branch for branch in branches}) < len(branches):
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
        self._client.close()

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
    client = branches[0]._client
    with ExitStack() as stack:
        calls = []
        for number, (branch, one) in enumerate(zip(branches, params, strict=True)):
            with _naming_branch(number, len(branches), listed):
                its_calls = stack.enter_context(branch._alone())
                calls.append(branch._call(branch._generating(one), its_calls))
        stack.enter_context(_restoring(branches))
        answers = client.ask(calls).result()
        client.check(answers)
        if isinstance(answers[-1], InvalidRequestError):  # of none that was begun is the answer of use
            _take_back(branches)
            with _naming_branch(len(answers) - 1, len(branches)):
                raise answers[-1]
        wait(answers)
        for branch, future in zip(branches, answers, strict=True):
            if future.exception() is None:
                branch._extended(future.result().token_ids)
        return [client.frontend.name_completion(future.result().output) for future in answers]


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
