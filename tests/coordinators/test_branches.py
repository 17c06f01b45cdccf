"""Sessions over the executor without a model: bookkeeping, parking, eviction, errors. Every block read is checked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest

from octavo.coordinators.branches import BranchState, SessionCoordinator
from octavo.coordinators.completion import Completion
from octavo.core.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from octavo.core.events import EventKind, Reason
from octavo.core.params import SamplingParams
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.session_calls import Call, Drop, Extend, Fork, Generate, Generated, Select, Truncate, Verb
from octavo.core.want import Score
from octavo.text.stream import IncrementalText, StopMatcher
from tests.engine.fake import VOCAB, Harness, expected, logprob, next_token


class ByteCodec:
    """Token i spells the letters of SPELLING[i]; real incremental text over them."""

    spelling: Sequence[str] = ()

    def encode_rest(self, before: Any, text: str) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def text_stream(self, prompt_token_ids: Any, *, stop: Any = (), **options: Any) -> IncrementalText:
        return IncrementalText(
            token_bytes=lambda token_id: (self.spelling or SPELLING)[token_id].encode(),
            skipped=frozenset(),
            strip_leading_space=False,
            prompt_token_ids=prompt_token_ids,
            stop=StopMatcher(stop) if stop else None,
            include_stop=options.get("include_stop_str_in_output", False),
        )


# Three letters a token, so that a stop string can begin and end inside one; single letters to spell what is left.
SPELLING = [chr(97 + i) for i in range(26)] + [chr(97 + i) + "xy"[i % 2] + chr(97 + i) for i in range(VOCAB - 26)]


class User:
    """A session as its front door uses it: messages to the engine, between steps."""

    def __init__(self, harness: Harness, name: str = "session", seed: int = 0, salt: str | None = None) -> None:
        self.harness = harness
        self.coordinator = SessionCoordinator(SessionSpec(name, seed, cache_salt=salt))
        harness.engine.add(self.coordinator)
        self.root = self.coordinator.root
        self._calls: dict[int, Call] = {}  # the last of each branch
        self._numbers = count()

    def ask(self, branch: BranchState, verb: Verb) -> Any:
        call = Call(next(self._numbers), branch.id, verb)
        answers = self.harness.engine.call(self.coordinator.request_id, [call])
        self.harness.check()
        if not answers:
            raise InvalidRequestError("session", "is closed")
        if isinstance(answers[0], InvalidRequestError):
            raise answers[0]
        self._calls[branch.id] = call
        return answers[0]

    def extend(self, branch: BranchState, token_ids: list[int]) -> None:
        self.ask(branch, Extend(tuple(token_ids)))

    def truncate(self, branch: BranchState, num_tokens: int) -> None:
        self.ask(branch, Truncate(num_tokens))

    def fork(self, branch: BranchState, count: int) -> list[BranchState]:
        return [self.coordinator._branches[child] for child in self.ask(branch, Fork(count))]

    def generate(self, branch: BranchState, count: int = 4, codec: Any = None, **params: Any) -> Future[Any]:
        self.coordinator.codec = codec
        sampling = SamplingParams(max_tokens=count, **params)
        return self.ask(branch, Generate(RequestSpec("session", (), sampling, self.coordinator.seed, max_tokens=count)))

    def select(self, branch: BranchState, choices: list[list[int]]) -> Future[Any]:
        return self.ask(branch, Select(tuple(map(tuple, choices))))

    def drop(self, branch: BranchState) -> None:
        self.ask(branch, Drop())

    def cancel(self, branch: BranchState) -> None:
        """Whoever asked for what was asked last has gone away."""
        self.harness.engine.take_back(self.coordinator.request_id, [self._calls[branch.id]])
        self.harness.check()

    def run(self, *futures: Future[Any]) -> list[Any]:
        for _ in range(2_000):
            if all(future.done() for future in futures):
                results = [future.result() for future in futures]
                return [result.output if isinstance(result, Generated) else result for result in results]
            assert self.harness.engine.has_unfinished_requests, "nothing to do, and somebody waits"
            self.harness.step()
        raise AssertionError("not finished")

    def close(self) -> None:
        self.harness.engine.abort(self.coordinator.request_id)
        self.harness.check()


def drawn(prompt: list[int], count: int, stream: tuple[int, ...], seed: int = 0) -> list[int]:
    """What the fake model draws after a prompt, alone."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, (seed, stream)))
    return token_ids[len(prompt) :]


def scores(prompt: list[int], choice: list[int]) -> list[float]:
    return [logprob(prompt + choice[:i], token_id) for i, token_id in enumerate(choice)]


def idle(harness: Harness) -> bool:
    return harness.kv.num_available == harness.kv.num_blocks


# --- the verbs ---


def test_generate_appends_and_draws_as_a_plain_request() -> None:
    """The root's first generate has the stream of a plain request; later ones and forks have their own."""
    user = User(Harness(), seed=5)
    user.extend(user.root, [1, 2, 3, 4, 5])
    (first,) = user.run(user.generate(user.root))
    assert first.token_ids == expected([1, 2, 3, 4, 5], 4, seed=5) and first.finish_reason == "length"
    held = [1, 2, 3, 4, 5, *first.token_ids]
    assert user.root.token_ids == held
    (second,) = user.run(user.generate(user.root))
    assert second.token_ids == drawn(held, 4, (1,), seed=5)
    held += second.token_ids
    left, right = user.fork(user.root, 2)
    (third,) = user.fork(user.root, 1)
    user.extend(right, [7])
    outputs = user.run(user.generate(left), user.generate(right), user.generate(third))
    assert outputs[0].token_ids == drawn(held, 4, (0, 0), seed=5)
    assert outputs[1].token_ids == drawn([*held, 7], 4, (1, 0), seed=5)
    assert outputs[2].token_ids == drawn(held, 4, (2, 0), seed=5), "a second fork has other numbers"
    assert user.root.token_ids == held
    user.close()
    assert idle(user.harness)


def test_branches_run_in_one_batch_over_shared_blocks() -> None:
    harness = Harness()
    user = User(harness)
    user.extend(user.root, list(range(30)))
    user.run(user.generate(user.root, 1))
    branches = user.fork(user.root, 4)
    steps, computed = len(harness.executor.plans), harness.executor.computed
    user.run(*[user.generate(branch, 6) for branch in branches])
    plans = harness.executor.plans[steps:]
    assert len(plans) == 6 and all(len(plan.grants) == 4 for plan in plans)
    assert len({grant.block_table[0] for grant in plans[-1].grants}) == 1, "blocks are shared"
    assert harness.executor.computed - computed == 4 * 6, "nothing was computed again"
    assert harness.kv.num_copies > 0
    user.close()
    assert idle(harness)


def test_truncate_and_a_second_generate() -> None:
    user = User(Harness())
    user.extend(user.root, list(range(10)))
    user.run(user.generate(user.root))
    user.truncate(user.root, 10)
    assert user.root.token_ids == list(range(10))
    (again,) = user.run(user.generate(user.root))
    assert again.token_ids == drawn(list(range(10)), 4, (1,)), "not the same draws again"
    with pytest.raises(InvalidRequestError, match="num_tokens: must be from 0 to 14"):
        user.truncate(user.root, 15)
    user.close()


@pytest.mark.parametrize("computed", [False, True])
def test_select_scores_every_token(computed: bool) -> None:
    """Choices of 1, 2, 3 and 50 tokens (several chunks), one a prefix of another, two equal; the branch computed or not
    when they are asked."""
    harness = Harness(max_num_batched_tokens=64, max_chunk_tokens=20)
    user = User(harness)
    prompt = list(range(21))
    user.extend(user.root, prompt)
    if computed:
        while harness.engine.has_unfinished_requests:
            harness.step()
    choices = [[3], [3, 4], [3, 4, 5], [9] * 50, [3, 4], [8, 7, 6]]
    steps = len(harness.executor.plans)
    (rows,) = user.run(user.select(user.root, choices))
    assert rows == [scores(prompt, choice) for choice in choices]
    assert user.root.token_ids == prompt and len(user.coordinator.sequences) == 1
    plans = harness.executor.plans[steps:]
    assert max(len(plan.grants) for plan in plans) == 5, "the longer choices ran together"
    wants = [one.want for plan in plans for grant in plan.grants for one in grant.wants]
    assert sum(len(want.sets) for want in wants if isinstance(want, Score)) == 6 + 5, "one row for all first tokens"
    assert harness.executor.computed == 21 + 49 + 2 + 1 + 1 + 2, "and nothing twice"
    (again,) = user.run(user.select(user.root, choices))
    assert again == rows, "KV of a choice is in the cache, its log-probabilities are not"
    user.close()
    assert idle(harness)


def test_select_of_single_tokens_takes_one_row() -> None:
    harness = Harness()
    user = User(harness)
    user.extend(user.root, [1, 2, 3])
    (rows,) = user.run(user.select(user.root, [[token_id] for token_id in range(20)]))
    assert rows == [[logprob([1, 2, 3], token_id)] for token_id in range(20)]
    assert [grant.num_tokens for plan in harness.executor.plans for grant in plan.grants] == [3]
    user.close()


# --- what a branch holds after an output ended ---


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_inside_a_token(include: bool) -> None:
    """The branch goes on with the text that was shown: whole tokens, and the letters of the last one anew."""
    prompt = [1, 2, 3]
    tokens = drawn(prompt, 12, (0,))
    cut = next(i for i, token_id in enumerate(tokens) if token_id >= 26 and i > 1)
    word = SPELLING[tokens[cut]]
    stop = word[1:2]
    assert not any(stop in SPELLING[token_id] for token_id in tokens[:cut]), "another seed is needed"
    user = User(Harness())
    user.extend(user.root, prompt)
    future = user.generate(user.root, 12, ByteCodec(), stop=stop, include_stop_str_in_output=include)
    (output,) = user.run(future)
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", stop, tokens[: cut + 1])
    rest = word[: 2 if include else 1]
    assert output.text == "".join(SPELLING[i] for i in tokens[:cut]) + rest
    assert user.root.token_ids == prompt + tokens[:cut] + [ord(c) - 97 for c in rest]
    (more,) = user.run(user.generate(user.root, 3, ByteCodec()))
    assert more.token_ids == drawn(prompt + tokens[:cut] + [ord(c) - 97 for c in rest], 3, (1,))
    user.close()
    assert idle(user.harness)


@pytest.mark.parametrize("include", [False, True])
def test_an_end_token_is_kept_only_if_it_is_shown(include: bool) -> None:
    prompt = [1, 2, 3]
    tokens = drawn(prompt, 8, (0,))
    at = next(i for i, token_id in enumerate(tokens) if tokens.index(token_id) == i and i > 0)
    user = User(Harness())
    user.extend(user.root, prompt)
    future = user.generate(user.root, 8, stop_token_ids=[tokens[at]], include_stop_str_in_output=include)
    (output,) = user.run(future)
    assert output.token_ids == tokens[: at + 1] and output.stop_reason == tokens[at]
    assert user.root.token_ids == prompt + tokens[: at + include]
    held = user.root.token_ids
    (more,) = user.run(user.generate(user.root))
    assert more.token_ids == drawn(held, 4, (1,)), "the last row was asked a second time"
    user.close()


def test_penalty_state_does_not_outlive_its_generate() -> None:
    """Guards against states attached to a branch for ever, which would count tokens of later calls."""
    user = User(Harness())
    user.extend(user.root, [1, 2, 3])
    for _ in range(3):
        user.run(user.generate(user.root, 3, ByteCodec(), presence_penalty=1.0))
        assert user.root.sequence is not None and user.root.sequence._attached == []
    user.close()


# --- idle sessions ---


def test_an_idle_session_wants_no_steps() -> None:
    """Guards an engine thread that spins, and a stalled engine that ends whoever is there."""
    harness = Harness()
    user = User(harness)
    assert not harness.engine.has_unfinished_requests
    user.extend(user.root, list(range(12)))
    user.run(user.generate(user.root))
    harness.step()
    assert not harness.engine.has_unfinished_requests
    steps = harness.engine.num_steps
    for _ in range(5):
        assert harness.step() == []
    assert harness.engine.num_steps == steps and not user.coordinator.finished
    # All that is pending is in the cache: nothing is granted, and the session is idle again.
    other = User(harness, "other")
    other.extend(other.root, list(range(9)))
    assert harness.engine.has_unfinished_requests
    harness.step()
    harness.step()
    assert harness.engine.num_steps == steps and not harness.engine.has_unfinished_requests
    assert other.root.sequence is not None and other.root.sequence.num_computed == 8
    user.close()
    other.close()
    assert idle(harness)


def test_idle_sessions_give_way_and_come_back() -> None:
    """Their blocks go to requests that run or wait, the session idle longest first; answers stay the same."""
    harness = Harness(num_blocks=16)
    users = [User(harness, f"s{i}") for i in range(3)]
    for i, user in enumerate(users):
        user.extend(user.root, [i] * 17)
        user.run(user.generate(user.root, 3))
    harness.step()
    assert all(user.root.sequence.block_table for user in users)  # type: ignore[union-attr]
    harness.add("first", [7] * 8, max_tokens=20)
    harness.step()
    harness.add("second", [8] * 20, max_tokens=4)  # waits beside one that runs: idle blocks count as to be had
    harness.step()
    evicted = [event.request_id for event in harness.engine.events.of(EventKind.EVICTED)]
    assert evicted[0] == "s0" and users[2].root.sequence.block_table  # type: ignore[union-attr]
    assert {event.reason for event in harness.engine.events.of(EventKind.EVICTED)} == {Reason.IDLE}
    assert harness.engine.scheduler.num_running == 2, "the second did not wait for the first to end"
    while harness.engine.has_unfinished_requests:
        harness.step()
    assert harness.tokens("first") == expected([7] * 8, 20) and harness.tokens("second") == expected([8] * 20, 4)
    for i, user in enumerate(users):
        held = user.root.token_ids
        (output,) = user.run(user.generate(user.root, 3))
        assert held == [i] * 17 + drawn([i] * 17, 3, (0,)) and output.token_ids == drawn(held, 3, (1,))
        user.close()
    assert idle(harness)


def test_an_idle_session_is_not_the_oldest_request() -> None:
    """A request too wide for the pool evicts its own later sequences, which only the oldest running one may: an idle
    session must not stand before it."""
    harness = Harness(num_blocks=10)
    user = User(harness)
    user.extend(user.root, [1] * 9)
    user.run(user.generate(user.root, 2))
    harness.add("wide", [2] * 8, max_tokens=20, n=6)
    while harness.engine.has_unfinished_requests:
        harness.step()
    for index in range(6):
        assert harness.tokens("wide", index) == expected([2] * 8, 20, index)
    user.close()
    assert idle(harness)


@pytest.mark.parametrize("caching", [False, True])
def test_branches_that_do_not_fit_together(caching: bool) -> None:
    """More branches and choices than blocks: they take turns, are evicted and restored, and answer as alone."""
    harness = Harness(num_blocks=12, caching=caching)
    user = User(harness)
    prompt = list(range(13))
    user.extend(user.root, prompt)
    branches = user.fork(user.root, 6)
    outputs = user.run(*[user.generate(branch, 20) for branch in branches])
    assert [output.token_ids for output in outputs] == [drawn(prompt, 20, (i, 0)) for i in range(6)]
    choices = [[i, *range(i, i + 18)] for i in range(8)]
    (rows,) = user.run(user.select(user.root, choices))
    assert rows == [scores(prompt, choice) for choice in choices]
    assert len(harness.engine.events.of(EventKind.EVICTED)) > 6
    user.close()
    assert idle(harness)


def test_a_session_is_preempted_and_restored_whole() -> None:
    """It is older than the other request, but what is asked of it is not."""
    harness = Harness(num_blocks=14, max_num_batched_tokens=16)
    user = User(harness)
    harness.add("old", [1] * 10, max_tokens=40)
    harness.step()
    user.extend(user.root, [2] * 12)
    branches = user.fork(user.root, 2)
    futures = [user.generate(branch, 12) for branch in branches]
    selected = user.select(user.root, [[5] * 6, [6] * 7])
    outputs = user.run(*futures, selected)
    preempted = {event.request_id for event in harness.engine.events.of(EventKind.PREEMPTED)}
    assert preempted == {"session"}, "and not the one that was there first"
    assert [output.token_ids for output in outputs[:2]] == [drawn([2] * 12, 12, (i, 0)) for i in range(2)]
    assert outputs[2] == [scores([2] * 12, [5] * 6), scores([2] * 12, [6] * 7)]
    while harness.engine.has_unfinished_requests:
        harness.step()
    assert harness.tokens("old") == expected([1] * 10, 40)
    user.close()
    assert idle(harness)


# --- misuse, errors and endings ---


def test_misuse_is_refused_and_changes_nothing() -> None:
    user = User(Harness())
    user.extend(user.root, [1, 2, 3])
    future = user.generate(user.root)
    for verb in (Extend((1,)), Fork(1), Truncate(0), Select(((1,),))):
        with pytest.raises(InvalidRequestError, match="branch: is at work on another call"):
            user.ask(user.root, verb)
    (output,) = user.run(future)
    assert output.token_ids == drawn([1, 2, 3], 4, (0,))
    (fork,) = user.fork(user.root, 1)
    user.drop(fork)
    user.drop(fork)
    with pytest.raises(InvalidRequestError, match="branch: was dropped"):
        user.extend(fork, [1])
    user.close()
    with pytest.raises(InvalidRequestError, match="session: is closed"):
        user.extend(user.root, [1])
    assert idle(user.harness)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelling_restores_the_branch(after: int) -> None:
    """While it waits, is computed, and has forks of its own under way."""
    harness = Harness(max_num_batched_tokens=16)
    user = User(harness)
    prompt = list(range(20))
    user.extend(user.root, prompt)
    left, right = user.fork(user.root, 2)
    generating = user.generate(left, 30)
    selecting = user.select(right, [[1] * 30, [2] * 30])
    for _ in range(after):
        harness.step()
    user.cancel(left)
    user.cancel(right)
    for future in (generating, selecting):
        with pytest.raises(RequestFailedError, match="cancelled"):
            future.result(0)
    assert left.token_ids == right.token_ids == prompt
    assert len(user.coordinator.sequences) == 3
    user.truncate(user.root, 0)
    harness.step()
    assert not harness.engine.has_unfinished_requests
    (output,) = user.run(user.generate(left))
    assert output.token_ids == drawn(prompt, 4, (0, 0)), "as if the first had never been asked for"
    user.close()
    assert idle(harness)


def test_an_error_ends_the_call_and_not_the_session() -> None:
    harness = Harness()
    user = User(harness)
    prompt = [1, 2, 3, 4, 5]
    user.extend(user.root, prompt)
    bad, good, third = user.fork(user.root, 3)
    user.extend(bad, [49])
    harness.executor.fail = lambda grant: 49 in grant.token_ids[: grant.stop]
    futures = [user.generate(bad), user.generate(good), user.select(third, [[1, 2, 3], [4, 49, 6], [7, 8]])]
    (output,) = user.run(futures[1])
    assert output.token_ids == drawn(prompt, 4, (1, 0)), "a neighbour in the batch goes on"
    for future in (futures[0], futures[2]):
        with pytest.raises(RequestFailedError, match="a row failed"):
            user.run(future)
    assert bad.token_ids == [*prompt, 49] and third.token_ids == prompt
    assert len(user.coordinator.sequences) == 4 and not user.coordinator.finished
    harness.executor.fail = lambda grant: False
    (output,) = user.run(user.generate(bad))
    assert output.token_ids == drawn([*prompt, 49], 4, (0, 0)), "what failed does not count"
    user.close()
    assert idle(harness)


@pytest.mark.parametrize("error", [KeyError, SystemError, type("Panic", (BaseException,), {})])
def test_an_error_at_the_end_of_a_call_reaches_the_caller(error: type[BaseException]) -> None:
    """Guards somebody who waits for ever: what a stop string cuts is encoded anew, and that may raise."""
    prompt = [1, 2, 3]
    tokens = drawn(prompt, 12, (0,))
    cut = next(i for i, token_id in enumerate(tokens) if token_id >= 26 and i > 1)
    user = User(Harness())

    class Broken(ByteCodec):
        def encode_rest(self, before: Any, text: str) -> list[int]:
            raise error("the tokenizer fell over")

    user.extend(user.root, prompt)
    future = user.generate(user.root, 12, Broken(), stop=SPELLING[tokens[cut]][1:2])
    with pytest.raises(RequestFailedError, match="the tokenizer fell over"):
        user.run(future)
    assert user.root.token_ids == prompt
    (output,) = user.run(user.generate(user.root, 3))
    assert output.token_ids == drawn(prompt, 3, (0,))
    user.close()
    assert idle(user.harness)


def test_a_call_that_cannot_begin_leaves_the_branch_free(monkeypatch: pytest.MonkeyPatch) -> None:
    user = User(Harness())
    user.extend(user.root, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(Completion, "attach_to", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            user.generate(user.root)
    (output,) = user.run(user.generate(user.root))
    assert output.token_ids == drawn([1, 2, 3], 4, (0,))
    user.close()


def test_computing_ahead_may_fail_unheard() -> None:
    """Nobody has asked for an answer yet: the engine neither ends the session nor tries for ever."""
    harness = Harness()
    user = User(harness)
    harness.executor.fail = lambda grant: True
    user.extend(user.root, list(range(10)))
    harness.step()
    harness.step()
    assert not harness.engine.has_unfinished_requests and not user.coordinator.finished
    harness.executor.fail = lambda grant: False
    (output,) = user.run(user.generate(user.root))
    assert output.token_ids == expected(list(range(10)), 4)
    user.close()


@pytest.mark.parametrize("how", ["close", "engine"])
def test_closing_tells_whoever_waits(how: str) -> None:
    harness = Harness()
    user = User(harness)
    user.extend(user.root, [1, 2, 3])
    left, right = user.fork(user.root, 2)
    futures = [user.generate(left, 30), user.select(right, [[1] * 9])]
    harness.step()
    dropped = user.generate(user.root)
    user.drop(user.root)
    user.close() if how == "close" else harness.engine.close()
    for future in futures:
        with pytest.raises(EngineClosedError, match="session was closed"):
            future.result(0)
    with pytest.raises(RequestFailedError, match="branch was dropped"):
        dropped.result(0)
    assert idle(harness) and harness.engine.num_requests == 0


def test_salts_keep_sessions_apart() -> None:
    harness = Harness()
    for name, salt, computed in (("a", "x", 21), ("b", "y", 42), ("c", "x", 43)):
        user = User(harness, name, salt=salt)
        user.extend(user.root, list(range(21)))
        user.run(user.generate(user.root, 1))
        assert harness.executor.computed == computed
        user.close()


def test_storm() -> None:
    """Random verbs on random branches of several sessions in a pool too small for them, beside plain requests: every
    answer is that of the branch's tokens alone, and the conservation law holds after every verb and step."""
    rng = random.Random(4)
    harness = Harness(num_blocks=22, max_num_batched_tokens=20)
    users: list[User] = []
    alive: dict[int, list[BranchState]] = {}
    waiting: list[tuple[User, BranchState, Future[Any], Any]] = []
    plain: dict[str, list[int]] = {}
    counts = dict.fromkeys(("generate", "select", "fork", "cancel", "close", "plain"), 0)

    def settle_answers() -> None:
        for entry in [entry for entry in waiting if entry[2].done()]:
            waiting.remove(entry)
            future, answer = entry[2:]
            if isinstance(future.exception(), RequestFailedError | EngineClosedError):
                continue
            result = future.result()
            if isinstance(result, Generated):
                counts["generate"] += 1
                assert result.output.token_ids == result.token_ids == answer
            else:
                counts["select"] += 1
                assert result == answer

    for operation in range(3_000):
        if len(users) < 3:
            users.append(User(harness, f"s{operation}", seed=operation))
            alive[id(users[-1])] = [users[-1].root]
        user = rng.choice(users)
        branches = alive[id(user)]
        branch = rng.choice(branches)
        working = branch.task is not None
        action = rng.random()
        if action < 0.45:
            harness.step()
        elif working:
            if action > 0.97:
                user.cancel(branch)
                counts["cancel"] += 1
        elif action < 0.6 or not branch.num_tokens:
            if branch.num_tokens < 40:
                user.extend(branch, [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))])
        elif action < 0.75 and branch.num_tokens < 50:
            held, count = branch.token_ids, rng.randint(1, 8)
            stream = (*branch.path, branch.num_generated)
            future = user.generate(branch, count)
            waiting.append((user, branch, future, drawn(held, count, stream, user.coordinator.seed)))
        elif action < 0.85 and branch.num_tokens < 50:
            choices = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 6))]
            future = user.select(branch, choices)
            waiting.append((user, branch, future, [scores(branch.token_ids, choice) for choice in choices]))
        elif action < 0.9:
            if len(branches) < 6:
                branches += user.fork(branch, rng.randint(1, 2))
                counts["fork"] += 1
        elif action < 0.94:
            user.truncate(branch, rng.randint(0, branch.num_tokens))
        elif action < 0.965 and len(branches) > 1:
            user.drop(branch)
            branches.remove(branch)
        elif action < 0.975:
            user.close()
            users.remove(user)
            counts["close"] += 1
        elif harness.engine.num_requests < 8:
            prompt, count = [rng.randrange(VOCAB)] * rng.randint(1, 30), rng.randint(1, 12)
            harness.add(f"p{operation}", prompt, count)
            plain[f"p{operation}"] = expected(prompt, count)
            counts["plain"] += 1
        settle_answers()
    while harness.engine.has_unfinished_requests:
        harness.step()
    settle_answers()
    assert not waiting
    assert {name: harness.tokens(name) for name in plain} == plain
    for user in users:
        user.close()
    assert idle(harness) and harness.engine.num_requests == 0
    assert min(counts.values()) > 5 and counts["generate"] > 100 and counts["select"] > 50, counts
    evictions = {event.reason for event in harness.engine.events.of(EventKind.EVICTED)}
    assert Reason.IDLE in evictions and harness.engine.events.of(EventKind.PREEMPTED) and harness.kv.num_copies > 0
